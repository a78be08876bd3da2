"""Whole groups for callers that train nothing: a profile, an evaluation, a judge, the check of the engines.

    async with SampledGroups(context, engines, engine_config) as sampled:
        await sampled.groups(flights)  # each has its rollouts then

The workers are those of RL (workers.py): an engine that is lost is replaced, and its replies go on where they stood.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType

from posttrain.config.engines import EngineConfig
from posttrain.context import StageContext
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.rollouter import Flight, Rollouter
from posttrain.sampling.worker_weights import CallsOf
from posttrain.sampling.workers import RolloutWorkers

MIN_GROUPS = 64  # at an engine at once
REPLACED_S = 0.2  # between two looks whether an engine that was lost is replaced


class SampledGroups:
    """Samples groups with `rollouter`; None means one turn for each. For the other arguments see `RolloutWorkers`."""

    def __init__(
        self,
        context: StageContext,
        engines: Engines,
        engine: EngineConfig,
        *,
        rollouter: Rollouter | None = None,
        wave_seed: Callable[[Flight], int] | None = None,
        calls: CallsOf | None = None,
        version: int = 0,
    ):
        self._workers = RolloutWorkers(
            context,
            engines,
            deadline_s=engine.deadline_s,
            finished=self._finish,
            rollouter=rollouter,
            wave_seed=wave_seed,
            calls=calls,
            version=version,
        )
        # An engine is busy with some groups while others wait in it for a place; more of them would only take memory.
        # A deterministic wave must be sent whole, because its content decides its samples.
        self._places = None if wave_seed else max(MIN_GROUPS, 2 * engine.max_num_seqs) * len(engines.seats)
        self._unfinished: dict[int, asyncio.Future[None]] = {}
        self._serving: asyncio.Task[None]

    async def __aenter__(self) -> "SampledGroups":
        self._serving = asyncio.ensure_future(self._workers.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def groups(self, flights: Iterable[Flight], on_done: Callable[[Flight], None] | None = None) -> None:
        """Sample the flights, and return when every flight has all its rollouts. Several calls may run at a time, if
        the orders of their flights differ.

        flights: each is taken when an engine has a place for it; in a deterministic wave all are taken at once.
        on_done: is called with each flight that is finished. Raises StageError if no engine can be started, and any
        error of the rollouter.
        """
        if self._places is None:
            flights = list(flights)
            places = len(flights)
        else:
            places = self._places
        waiting = iter(flights)

        async def drain() -> None:
            for flight in waiting:
                finished = self._unfinished[flight.order] = asyncio.get_running_loop().create_future()
                self._workers.send(flight)
                await finished
                if on_done is not None:
                    on_done(flight)

        async def sample() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(places):
                    group.create_task(drain())

        await self._while_served(sample())

    async def update(self, manifest: Manifest, version: int) -> list[str]:
        """Have every worker load new weights, also a worker whose engine is replaced meanwhile. Returns their names."""

        async def update() -> None:
            await self._workers.weights.update(manifest, version)
            while any(not one.is_alive or one.policy_version < version for one in self._workers.workers):
                await asyncio.sleep(REPLACED_S)

        await self._while_served(update())
        return [worker.name for worker in self._workers.workers]

    async def _while_served(self, work: Coroutine[None, None, None]) -> None:
        """Wait until the work is done. If the workers fail before, raise their error."""
        doing = asyncio.ensure_future(work)
        try:
            await asyncio.wait({doing, self._serving}, return_when=asyncio.FIRST_COMPLETED)
            if self._serving.done():
                self._serving.result()
            await doing
        finally:
            doing.cancel()

    def _finish(self, flight: Flight) -> None:
        finished = self._unfinished.pop(flight.order)
        if not finished.done():  # else whoever waited has given up
            finished.set_result(None)
