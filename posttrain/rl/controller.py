"""The controller of asynchronous RL: one small asyncio process that moves records and waits in one place.

    prompts ──► dispatch ──► engines (vLLM actors) ──► reward pool ──► group
                   ▲                                                     │ zero advantage, unscored: dropped,
                   │ room in the queue                                   │ its place free at once
                   └──────────────── StalenessQueue ◄────────────────────┘
                                          │ a whole batch, in dispatch order; the trainer waits here only
                                          ▼
                     engines ◄── weights v+1 ── trainer (its own ranks): step ──► metrics, checkpoint

Dispatch waits for room. An engine never waits for the trainer: it takes new weights between two of its steps, with
requests in flight. The trainer starts its next step while the engines still take the weights of the last one.
"""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.alarm import UnscoredAlarm
from posttrain.rl.archive import RolloutArchive
from posttrain.rl.busy import BusyLog
from posttrain.rl.config import RlConfig
from posttrain.rl.groups import DrawnPrompt, ScoredGroup
from posttrain.rl.profile import PASS_THRESHOLD, sample_request
from posttrain.rl.prompts import PromptSource
from posttrain.rl.samples import train_samples
from posttrain.rl.scoring import drop_reason, make_group, over_batch, score_group
from posttrain.rl.staleness import StalenessQueue
from posttrain.rl.tally import StepTally
from posttrain.sampling.client import Engines
from posttrain.sampling.requests import SampleRequest
from posttrain.scoring.client import RewardClient


class Controller:
    """Runs `steps` optimizer steps. `trainer` holds `PolicyTrainer`s; engines hold version `first_step`.

    shares: of each capability in every batch.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        engines: Engines,
        trainer: RankGroup,
        source: PromptSource,
        shares: Mapping[str, float],
        archive: RolloutArchive,
        stop_ids: tuple[int, ...],
        first_step: int = 0,
    ):
        self._config = config
        self._context = context
        self._engines = engines
        self._trainer = trainer
        self._source = source
        self._archive = archive
        self._stop_ids = stop_ids
        self._version = first_step  # of the trainer: optimizer steps that are applied
        self._next_version = first_step  # at which the next batch will be trained
        self._engine_versions = [first_step] * len(engines.actors)
        self._in_flight_on = [0] * len(engines.actors)
        self._queue = StalenessQueue(
            config.groups_per_step, config.max_staleness, shares, config.mixture_refills, first_step
        )
        self._ready: dict[int, tuple[ScoredGroup, float]] = {}  # with the Unix time since when
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._update: asyncio.Task[None] | None = None
        self._dropped_in_a_row = 0
        self._failure: BaseException | None = None
        self._generated = [BusyLog(context, name, "generate") for name in engines.names]
        self._scored = BusyLog(context, "reward", "score")
        logs = dict(zip(engines.names, self._generated, strict=True))
        self._tally = StepTally({**logs, "reward": self._scored})
        self._pool = RewardClient(config.reward, config.resources.reward)
        self._alarm = UnscoredAlarm(config)

    async def run(self) -> None:
        """Train to the last step."""
        await self._pool.start()
        try:
            while self._next_version < self._config.steps:
                await self._one_step()
            await self._finish_update()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._pool.close()
            for log in (*self._generated, self._scored):
                log.flush()

    # ------------------------------------------------------------------ generation

    def _dispatch(self) -> None:
        """Admit as many groups as there is room for; each is sampled by the engine with the fewest in flight."""
        for _ in range(self._queue.room(min(self._engine_versions))):
            engine = min(range(len(self._in_flight_on)), key=self._in_flight_on.__getitem__)
            order, capability = self._queue.admit(min(self._engine_versions))
            self._in_flight_on[engine] += 1
            task = asyncio.create_task(self._sample(order, engine, self._source.draw(capability)))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    async def _sample(self, order: int, engine: int, prompt: DrawnPrompt) -> None:
        request = self._request(prompt)
        try:
            completions, began, ended = await self._engines.actors[engine].generate.remote([request])
        finally:
            self._in_flight_on[engine] -= 1
        self._generated[engine].add(began, ended)
        group = make_group(order, prompt, completions[0], self._engines.names[engine], began, ended)
        scoring = time.time()
        scored = await score_group(group, self._pool, self._config)
        self._scored.add(scoring, time.time())
        reason = drop_reason(scored, self._config)
        self._tally.decided(scored, reason)
        alarm = self._alarm.observe(scored)
        if alarm is not None:
            self._context.event("alarm", **alarm)
        passes = sum(reward > PASS_THRESHOLD for reward in scored.scored_rewards)
        self._source.observe(prompt.row.id, passes, len(scored.scored_rewards) - passes)
        if reason is None:
            self._dropped_in_a_row = 0
            self._ready[order] = (scored, time.time())
            self._queue.ready(order)
        else:
            self._drop(scored, reason)

    def _request(self, prompt: DrawnPrompt) -> SampleRequest:
        return sample_request(self._config, prompt, self._config.group_size, self._stop_ids)

    @property
    def _idle_limit(self) -> int:
        """Groups dropped in a row after which there is no point in going on."""
        return self._config.stop_after_idle_steps * self._config.groups_per_step

    def _drop(self, scored: ScoredGroup, reason: str) -> None:
        self._queue.drop(scored.group.order)
        self._archive.add(scored, None, self._version, f"dropped:{reason}")
        self._dropped_in_a_row += 1
        limit = self._idle_limit
        if self._dropped_in_a_row >= limit:
            rewards = Counter(reward for reward in scored.rewards)
            raise StageError(
                f"{limit} groups in a row taught nothing (the last: {reason}, rewards {dict(rewards)}); "
                "choose prompts of other difficulty (profile.band) or look at the reward"
            )

    # ------------------------------------------------------------------ training

    async def _next_batch(self) -> tuple[list[ScoredGroup], list[float]]:
        """The one place where training waits for generation. Returns the groups, and since when each was ready."""
        while True:
            if self._failure is not None:
                raise self._failure
            self._dispatch()
            orders = self._queue.take(self._next_version)
            if orders is not None:
                groups, ready_since = zip(*(self._ready.pop(order) for order in orders), strict=True)
                return over_batch(groups, self._config), list(ready_since)
            self._changed.clear()
            await self._changed.wait()

    async def _one_step(self) -> None:
        waiting = time.time()
        batch, ready_since = await self._next_batch()
        now = time.time()
        step = self._next_version
        oldest = step - min(scored.group.oldest_version for scored in batch)
        if oldest > self._config.max_staleness:
            raise StageError(f"step {step}: a group is {oldest} versions old; the bound does not hold")
        self._next_version = step + 1
        self._dispatch()  # the batch's places are free: generation goes on beside the step
        training = asyncio.ensure_future(self._trainer.call("step", train_samples(batch, step), step))
        while not training.done():
            self._changed.clear()
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({training, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if self._failure is not None:
                raise self._failure
            self._dispatch()
        result = training.result()
        self._version = step + 1
        self._context.busy("trainer", "train", result["began"], result["ended"])
        # Two segments are written in turn: the engines must have taken the last version before the next is written.
        await self._finish_update()
        self._update = asyncio.create_task(self._update_engines(result["manifest"], step + 1))
        self._update.add_done_callback(self._done)  # a failed update ends the run instead of leaving it waiting
        for scored in batch:
            self._archive.add(scored, step, step, "trained")
        self._archive.write(step)
        ages_s = [now - since for since in ready_since]
        metrics = self._tally.values(step, batch, ages_s, now - waiting, result["metrics"])
        self._tell(step, {**metrics, **self._source.advance(step + 1, metrics["pass_rate"])})
        if self._checkpoint_is_due(step + 1):
            await self._checkpoint(step + 1)

    async def _update_engines(self, manifest: dict[str, Any], version: int) -> None:
        async def update(index: int) -> None:
            began, ended = await self._engines.actors[index].update_weights.remote(manifest, version)
            self._engine_versions[index] = version
            self._context.busy(self._engines.names[index], "update_weights", began, ended)
            self._changed.set()

        await asyncio.gather(*(update(index) for index in range(len(self._engines.actors))))

    async def _finish_update(self) -> None:
        if self._update is not None:
            await self._update

    def _checkpoint_is_due(self, version: int) -> bool:
        """The last version needs none: it is the stage's result."""
        return version % self._config.checkpoint_every == 0 and version < self._config.steps

    async def _checkpoint(self, version: int) -> None:
        folder = self._context.dir / "checkpoints" / f"step_{version}"
        folder.parent.mkdir(exist_ok=True)
        await self._trainer.call("save_checkpoint", str(folder), {"source": self._source.state()})
        for old in folder.parent.glob("step_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    # ------------------------------------------------------------------ what is told

    def _tell(self, step: int, metrics: dict[str, Any]) -> None:
        values = {
            **metrics,
            "queue_groups": self._queue.num_ready,
            "in_flight_groups": self._queue.num_in_flight,
            "places_lent": self._queue.num_lent,
        }
        self._context.metrics(step, values)
        shown = ("reward_mean", "pass_rate", "staleness_mean", "queue_groups", "generate_tokens_per_s")
        self._context.progress(
            step + 1,
            self._config.steps,
            "steps",
            {**{name: values[name] for name in shown}, "dropped_groups": values["groups_dropped_zero_advantage"]},
        )
