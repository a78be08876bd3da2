"""The loop of elastic engines: asks `Scaling` after each step how many there should be, and has them join and leave.

    step ──► Scaling ──► jobs ──► join: in the background, several at a time ─┐
                           ▲  └─► leave: one after the other                  ├─► the next window of steps
    lost three times ──────┘                                                  ┘

Training waits for none of this. Left out: what joining and leaving is (sampling/joining.py).
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from posttrain.actors.losses import is_loss, reason_of, root_of
from posttrain.config.resources import ActorResources, RolloutResources, TrainerResources
from posttrain.context import StageContext
from posttrain.errors import PosttrainError
from posttrain.records import DrawnPrompt
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.scaling import Scaling, StepFigures
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.client import Engines
from posttrain.sampling.joining import join, leave
from posttrain.sampling.worker import Worker
from posttrain.sampling.workers import RolloutWorkers

LEAVE_S = 30.0  # that an engine may go on with what it has; others sample the rest again
COMPARED_TOKENS = 16


def scaling_of(config: RlConfig) -> Scaling:
    """The policy for a stage. Costs are GPUs or, if the engines use none, CPUs."""
    resources, rollout = config.resources, config.resources.rollout
    is_gpu = bool(rollout.gpus)

    def devices(item: RolloutResources | TrainerResources | ActorResources | None) -> float:
        return 0.0 if item is None else item.gpus if is_gpu else item.cpus

    judge = resources.judge
    others = config.parallel.processes * devices(resources.trainer) + devices(resources.reference)
    others += judge.workers * devices(judge) if judge is not None else 0.0
    return Scaling(
        rollout.least,
        rollout.most,
        engine_cost=devices(rollout) or 1.0,
        other_cost=others,
        settling=1 + config.max_staleness,
    )


class Elastic:
    """Changes the number of `workers`. Only a stage whose `resources.rollout.workers` is a range has one.

    prompts: by which a new engine is compared with the others. stop_ids: token ids that end a reply. tolerance: the
    largest mean gap of log-probabilities. changed: is called with each worker that has joined, and True, or left.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        workers: RolloutWorkers,
        *,
        engines: Engines,
        prompts: Sequence[DrawnPrompt],
        stop_ids: tuple[int, ...],
        tolerance: float,
        changed: Callable[[Worker, bool], None],
    ):
        self._context = context
        self._workers = workers
        self._engines = engines
        self._scaling = scaling_of(config)
        self._tolerance = tolerance
        self._changed = changed
        tokens = min(COMPARED_TOKENS, config.sampling.max_tokens)
        self._requests = [
            replace(sample_request(config.sampling, prompt, 1, stop_ids=stop_ids), temperature=0.0, max_tokens=tokens)
            for prompt in prompts
        ]
        self._jobs: asyncio.Queue[int | Worker] = asyncio.Queue()  # a number of engines, or a worker that is given up
        self._is_changing = False
        self._looked = (0, 0)

    @property
    def num_engines(self) -> int:
        """Engines that sample, or are being replaced."""
        return len(self._workers.counted)

    def step(self, seconds: float, waited_s: float) -> None:
        """Take note of an optimizer step. seconds: since the one before. waited_s: for its batch."""
        loads = self._workers.loads
        (looked, at_work), self._looked = self._looked, (loads.looked, loads.at_work)
        work = (loads.at_work - at_work) / max(1, loads.looked - looked)
        now = self.num_engines
        decision = self._scaling.observe(
            StepFigures(seconds, waited_s, work), now, is_changing=self._is_changing or not self._jobs.empty()
        )
        if decision is not None:
            self._is_changing = True
            self._context.event("engines_wanted", workers=decision.workers, before=now, reason=decision.reason)
            self._jobs.put_nowait(decision.workers)

    def given_up(self, worker: Worker, reason: str) -> None:
        """Note that the engine of a worker was lost again and again."""
        self._context.event("engine_given_up", name=worker.name, reason=reason, engines=self.num_engines)
        self._jobs.put_nowait(worker)

    async def run(self) -> None:
        """Make the changes. Runs until it is cancelled."""
        while True:
            job = await self._jobs.get()
            self._is_changing = True
            if isinstance(job, Worker):
                await self._bury(job)
            elif job > self.num_engines:
                await asyncio.gather(*(self._join() for _ in range(job - self.num_engines)))
            else:
                for worker in self._to_leave(self.num_engines - job):
                    await self._leave(worker)
            self._is_changing = False

    async def _bury(self, worker: Worker) -> None:
        self._workers.take_out(worker)
        await self._engines.leave(worker.seat)
        self._changed(worker, False)
        self._scaling.refused(self.num_engines)

    async def _join(self) -> None:
        began = time.time()
        try:
            worker, gap = await join(self._workers, self._engines, self._requests, tolerance=self._tolerance)
        except Exception as error:
            if not (is_loss(error) or isinstance(root_of(error), PosttrainError)):
                raise
            self._context.event("engine_refused", reason=reason_of(error), engines=self.num_engines)
            self._scaling.refused(self.num_engines)
            return
        self._context.event(
            "engine_joined", name=worker.name, seconds=time.time() - began, mean_gap=gap,
            version=worker.policy_version, engines=self.num_engines,
        )  # fmt: skip
        self._changed(worker, True)

    def _to_leave(self, count: int) -> list[Worker]:
        """Those with the least work. One that is kept for an evaluation stays."""
        able = [worker for worker in self._workers.counted if not worker.is_kept]
        return sorted(able, key=lambda worker: worker.num_unfinished)[:count]

    async def _leave(self, worker: Worker) -> None:
        handed_over = await leave(self._workers, self._engines, worker, within_s=LEAVE_S)
        self._context.event("engine_left", name=worker.name, handed_over=handed_over, engines=self.num_engines)
        self._changed(worker, False)
