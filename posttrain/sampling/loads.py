"""How many replies each engine samples at a time, and how fast: an event for each stretch of time. What a step of an
engine costs is in step_sums.py.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from posttrain.context import StageContext
from posttrain.sampling.worker import Worker

LOOK_S = 0.1
STRETCH_S = 2.0


class WorkerLoads:
    """Looks at the workers now and then, while `run` runs, and appends an event for each worker that has work."""

    def __init__(self, context: StageContext, workers: Sequence[Worker]):
        self._context = context
        self._workers = workers
        self._tokens: Counter[Worker] = Counter()
        self._running: Counter[Worker] = Counter()
        self._working: Counter[Worker] = Counter()  # looks at which it had something to sample
        self._looks = 0
        self._since = 0.0
        # Looks at workers that have an engine, and those of them at which it had something to sample.
        self.looked = self.at_work = 0

    def sampled(self, worker: Worker, tokens: int) -> None:
        """Count tokens that have come from a worker's engine."""
        self._tokens[worker] += tokens

    async def run(self) -> None:
        """Look until cancelled."""
        self._since = time.time()
        while True:
            await asyncio.sleep(LOOK_S)
            self._looks += 1
            for worker in self._workers:
                self._running[worker] += (running := worker.num_unfinished)
                self._working[worker] += running > 0
                self.looked += worker.is_alive
                self.at_work += worker.is_alive and running > 0
            if time.time() - self._since >= STRETCH_S:
                self._tell()

    def _tell(self) -> None:
        """Append the events.

        running: mean number of replies that an engine had to sample, those that wait included. at_work: share of the
        time in which it had any.
        """
        now = time.time()
        for worker in self._workers:
            if self._running[worker]:
                self._context.event(
                    "engine_load",
                    engine=worker.name,
                    seconds=now - self._since,
                    running=self._running[worker] / self._looks,
                    at_work=self._working[worker] / self._looks,
                    tokens=self._tokens[worker],
                )
        self._tokens.clear()
        self._running.clear()
        self._working.clear()
        self._looks, self._since = 0, now
