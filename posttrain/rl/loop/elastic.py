"""The loop of elastic engines: asks `Scaling` after each step how many there should be, and has them join and leave.

    the first steps ──► forecast ──┐
    step ──────────────► Scaling ──┴► jobs ──► join: in the background, several at a time ─┐
                                       ▲  └──► leave: one after the other                  ├─► the next window of steps
    lost three times ──────────────────┘                                                   ┘

The forecast is asked once, and only if the config says so; until then `Scaling` is not asked. A run that is continued
begins with the engines that it had. Training waits for none of this. Left out: what joining and leaving is
(sampling/joining.py), and the forecast itself, which is handed in (forecast/engines.py).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from msgspec.structs import replace

from posttrain.actors.losses import is_loss, reason_of, root_of
from posttrain.context import StageContext
from posttrain.errors import PosttrainError
from posttrain.records import DrawnPrompt
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.scaling import Choice, Scaling, StepFigures, role_costs
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.client import Engines
from posttrain.sampling.joining import join, leave
from posttrain.sampling.worker import Worker
from posttrain.sampling.workers import RolloutWorkers

WARM_UP_STEPS, WARM_UP_S = 10, 12.0  # after the first step; a forecast is made from them
LEAVE_S = 30.0  # that an engine may go on with what it has; others sample the rest again
COMPARED_TOKENS = 16


def scaling_of(config: RlConfig) -> Scaling:
    """The policy for a stage."""
    rollout, (engine_cost, other_cost) = config.resources.rollout, role_costs(config)
    return Scaling(
        rollout.least,
        rollout.most,
        engine_cost=engine_cost,
        other_cost=other_cost,
        settling=1 + config.max_staleness,
    )


class Elastic:
    """Changes the number of `workers`. Only a stage whose `resources.rollout.workers` is a range has one.

    prompts: by which a new engine is compared with the others. stop_ids: token ids that end a reply. tolerance: the
    largest mean gap of log-probabilities. changed: is called with each worker that has joined, and True, or left.
    forecast: chooses the number of engines from what the run has shown; None: `Scaling` alone does. had: engines that
    the run had before it was interrupted, or None.
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
        forecast: Callable[[int], Choice] | None = None,
        had: int | None = None,
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
        # A number of engines, a forecast that tells it, or a worker that is given up.
        self._jobs: asyncio.Queue[int | Callable[[int], Choice] | Worker] = asyncio.Queue()
        self._is_changing = False
        self._looked = (0, 0)
        self._forecast = forecast if had is None else None
        rollout = config.resources.rollout
        self._had = None if had is None else max(rollout.least, min(rollout.most, had))
        self._steps, self._seconds = -1, 0.0  # since the first step

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
        if self._is_begun_otherwise(seconds, now):
            return
        decision = self._scaling.observe(
            StepFigures(seconds, waited_s, work), now, is_changing=self._is_changing or not self._jobs.empty()
        )
        if decision is not None:
            self._want(decision.workers, now, decision.reason)

    def _is_begun_otherwise(self, seconds: float, now: int) -> bool:
        """Whether the number of engines is, or will be, decided by the run before this one, or by a forecast."""
        if self._had is not None and not self._is_changing:
            had, self._had = self._had, None
            if had != now:
                self._want(had, now, "the run had so many when it was interrupted")
                return True
        if self._forecast is None:
            return False
        self._steps += 1
        self._seconds += seconds if self._steps else 0.0
        if self._steps >= WARM_UP_STEPS and self._seconds >= WARM_UP_S:
            self._is_changing = True
            self._jobs.put_nowait(self._forecast)
            self._forecast = None
        return True

    def _want(self, workers: int, now: int, reason: str) -> None:
        self._is_changing = True
        self._context.event("engines_wanted", workers=workers, before=now, reason=reason)
        self._jobs.put_nowait(workers)

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
            else:
                await self._change_to(job if isinstance(job, int) else await self._forecast_number(job))
            self._is_changing = False

    async def _change_to(self, workers: int) -> None:
        now = self.num_engines
        if workers > now:
            able = min(workers, now + await self._engines.room())
            if able < workers:  # nothing waits for a host that may join: the policy asks again later
                self._context.event("engines_limited", wanted=workers, room=able, engines=now)
                self._scaling.refused(able)
            await asyncio.gather(*(self._join() for _ in range(able - now)))
        else:
            for worker in self._to_leave(now - workers):
                await self._leave(worker)

    async def _forecast_number(self, forecast: Callable[[int], Choice]) -> int:
        """The number that a forecast chooses. One that cannot be made changes nothing: the policy goes on alone."""
        now = self.num_engines
        try:
            choice = await asyncio.to_thread(forecast, now + await self._engines.room())
        except PosttrainError as error:
            self._context.event("engines_not_forecast", reason=str(error), engines=now)
            return now
        self._context.event(
            "engines_forecast", workers=choice.workers, before=now, reason=choice.reason, costs=choice.costs,
            tried=[asdict(item) for item in choice.tried],
        )  # fmt: skip
        self._scaling.expect(choice.tried)
        return choice.workers

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
