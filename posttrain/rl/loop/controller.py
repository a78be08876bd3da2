"""The controller of asynchronous RL: one small asyncio process that moves records and waits in one place.

    prompts ──► dispatch ──► engines (vLLM actors) ──► [judge] ──► reward actor ──► [reference] ──► group
                   ▲                                                     │ zero advantage, unscored: dropped,
                   │ room in the queue                                   │ its place free at once
                   └──────────────── StalenessQueue ◄────────────────────┘
                                          │ a whole batch, in dispatch order; the trainer waits here only
                                          ▼
                     engines ◄── weights v+1 ── trainer (its own ranks): step ──► metrics, checkpoint, commit

Judge and reference are models of their own, where the config names them: on engines, and in a process. Dispatch waits
for room. An engine never waits for the trainer: it takes new weights between two of its steps, with
requests in flight. The trainer starts its next step while the engines still take the weights of the last one. Every
transition of a group goes into the ledger, which a task of its own writes to the disk.
"""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.records import DrawnPrompt
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.alarm import UnscoredAlarm
from posttrain.rl.grading.groups import drop_reason, over_batch, passes_and_failures, score_group
from posttrain.rl.grading.judge import Judge, rewards
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import UNDECIDED, Commit, Entry, Ledger
from posttrain.rl.history.recovery import CHECKPOINTS, SNAPSHOT, Survivor, folder_hash, scores_json
from posttrain.rl.loop.garbage import rare_collections
from posttrain.rl.loop.side import SideWork
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.tally import StepTally, sampled_before
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Drop, DropReason, Group, LedgerEvent, ScoredGroup, group_of_flight
from posttrain.rl.rollouts.requests import sample_request, wave_seed
from posttrain.rl.rollouts.weights import update_calls
from posttrain.rl.training.client import TrainerClient, manifest_of
from posttrain.rl.training.evidence import keep_evidence
from posttrain.rl.training.reference import Reference, with_reference
from posttrain.rl.training.samples import train_samples
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import Reply
from posttrain.sampling.workers import RolloutWorkers

FLUSH_S = 0.05
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a controller moves records between.

    shares: of each capability in every batch. stop_ids: token ids that end a reply. heldout:
    prompts of `evaluation`. profile: of the prompts.
    """

    engines: Engines
    trainer: TrainerClient
    reference: Reference | None
    source: PromptSource
    shares: Mapping[str, float]
    archive: RolloutArchive
    ledger: Ledger
    stop_ids: tuple[int, ...]
    heldout: Sequence[DrawnPrompt] = ()
    judge: Judge | None = None
    profile: Sequence[Difficulty] = ()


class Controller:
    """Runs `steps` optimizer steps. The engines hold version `first_step`, whose weights are `manifest`.

    survivors: groups of before a crash, the oldest stamp first.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        parts: Parts,
        manifest: Manifest,
        first_step: int = 0,
        survivors: Sequence[Survivor] = (),
    ):
        self._config = config
        self._context = context
        self._parts = parts
        self._trainer = parts.trainer
        self._source = parts.source
        self._archive = parts.archive
        ledger = self._ledger = parts.ledger
        self._next_version = first_step  # at which the next batch will be trained
        self._queue = StalenessQueue(
            config.groups_per_step,
            config.max_staleness,
            parts.shares,
            config.mixture_refills,
            first_step,
            config.staleness,
            ledger.next_order,
            0.0 if config.deterministic else config.over_provision,
        )
        self._survivors = survivors
        self._returning: dict[int, Entry] = {}  # groups of before a crash that start again once there is room
        self._ready: dict[int, tuple[ScoredGroup, float]] = {}  # with the Unix time since when
        self._scoring: dict[int, Group] = {}  # sampled, and not decided
        self._archived_seq = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._update: asyncio.Task[None] | None = None
        self._dropped_in_a_row = 0
        self._failure: BaseException | None = None
        self._workers = RolloutWorkers(
            context,
            parts.engines,
            deadline_s=config.engine.deadline_s,
            finished=self._sampled,
            begun=self._begun,
            calls=partial(update_calls, config),
            manifest=manifest,
            version=first_step,
            took=self._took,
            replaced=self._replaced,
            wave_seed=partial(wave_seed, context.seed) if config.deterministic else None,
        )
        self._scored = BusyLog(context, "reward", "score")
        self._tally = StepTally(
            {**{worker.name: worker.log for worker in self._workers.workers}, "reward": self._scored}
            | (dict(parts.judge.logs) if parts.judge is not None else {}),
            {item.prompt_id: item.pass_rate for item in parts.profile},
            config.reward.correct_threshold,
        )
        self._tokens_sampled = sampled_before(context.dir, sum(item.tokens for item in parts.profile))
        self._pool = rewards(config, parts.judge)
        self._alarm = UnscoredAlarm(config.reward.alarm_fraction, config.groups_per_step)
        self._side = SideWork(
            config, context, self._workers, self._pool, parts.source, first_step, parts.heldout, parts.stop_ids,
            ledger.event,
        )  # fmt: skip

    async def run(self) -> None:
        """Train to the last step."""
        await self._pool.start()
        with rare_collections():
            try:
                self._start(self._workers.run())
                self._start(self._keep_ledger())
                self._go_on_with(self._survivors)
                while self._next_version < self._config.steps:
                    await self._one_step()
                self._side.stop()
                await self._finish_update()
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._pool.close()
                self._scored.flush()
                await self._ledger.flush()

    def finish(self) -> None:
        """After the last step: what is not decided never will be."""
        for entry in self._ledger.entries(UNDECIDED):
            scored = self._ready.pop(entry.id, None)
            self._ledger.dropped(entry.id, DropReason.FINISHED)
            if scored is not None:
                self._archive.add(scored[0], None, self._next_version, f"dropped:{DropReason.FINISHED}")
        self._archive.write(self._next_version)
        self._ledger.event(LedgerEvent.FINISHED, self._next_version)

    def _start(self, work: "Awaitable[None]") -> asyncio.Task[None]:
        """Beside everything else; its failure ends the run."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _keep_ledger(self) -> None:
        while True:
            await self._ledger.flush()
            await asyncio.sleep(FLUSH_S)

    # ------------------------------------------------------------------ generation

    def _go_on_with(self, survivors: Iterable[Survivor]) -> None:
        """Groups of before a crash: each goes on from where it stood, or starts again when there is room."""
        for survivor in survivors:
            entry, scored = survivor.entry, survivor.scored
            if scored is not None and (reason := drop_reason(scored, self._config)) is not None:
                self._ledger.dropped(entry.id, str(reason))
                self._archive.add(scored, None, self._next_version, f"dropped:{reason}")
                continue
            adopted = survivor.replies and self._queue.adopt(
                entry.id, entry.capability, survivor.stamp, scored is not None
            )
            if not adopted:
                self._returning[entry.id] = entry
            elif scored is not None:
                self._ready[entry.id] = (scored, time.time())
            elif survivor.group is not None:
                self._begin_scoring(survivor.group)
            else:
                self._ledger.restart_group(entry.id, survivor.stamp, survivor.replies)
                prompt = self._source.prompt(entry.prompt_id, entry.system)
                self._send(entry.id, survivor.stamp, prompt, survivor.replies)

    def _dispatch(self) -> None:
        """Admit as many groups as there is room for; a deterministic run in waves, one when the last is decided."""
        if self._config.deterministic and self._queue.num_in_flight:
            return
        self._side.dispatch(self._next_version)
        for _ in range(self._queue.room(self._workers.oldest_version)):
            stamp = self._workers.oldest_version
            new = self._queue.next_order
            order, capability = self._queue.admit(stamp, self._first_returning if self._returning else None)
            if order == new:
                prompt, looks = self._source.draw(capability, order), self._source.looks(capability)
                self._ledger.reserve(order, prompt.row.id, capability, prompt.system, looks, stamp)
            else:
                entry = self._returning.pop(order)
                prompt = self._source.prompt(entry.prompt_id, entry.system)
                self._ledger.restart_group(order, stamp, ())
            self._send(order, stamp, prompt)

    def _first_returning(self, capability: str) -> int | None:
        return next((order for order, entry in self._returning.items() if entry.capability == capability), None)

    def _send(self, order: int, stamp: int, prompt: DrawnPrompt, recorded: Sequence[Reply] = ()) -> None:
        self._workers.send(Flight(order, stamp, prompt, self._request(prompt), recorded))

    def _request(self, prompt: DrawnPrompt) -> SampleRequest:
        config = self._config
        return sample_request(config.sampling, prompt, config.group_size, stop_ids=self._parts.stop_ids)

    def _begun(self, flight: Flight) -> None:
        if flight.order >= 0:
            self._ledger.begun(flight.order, flight.replies)

    def _took(self, worker: str, version: int) -> None:
        """A worker has new weights: there may be room now."""
        self._ledger.event(LedgerEvent.WEIGHTS_TAKEN, [worker, version])
        self._changed.set()

    def _replaced(self, worker: str, reason: str) -> None:
        self._ledger.event(LedgerEvent.ENGINE_REPLACED, [worker, reason])
        self._changed.set()

    def _sampled(self, flight: Flight) -> None:
        if flight.order < 0:
            self._start(self._side.take(flight))
            return
        self._ledger.generated(flight.order, flight.replies)
        self._begin_scoring(group_of_flight(flight))

    def _begin_scoring(self, group: Group) -> None:
        self._scoring[group.order] = group
        self._start(self._score(group))

    async def _score(self, group: Group) -> None:
        began = time.time()
        scored = await score_group(group, self._pool, self._config)
        self._scored.add(began, time.time())
        reason = drop_reason(scored, self._config)
        if reason is None and self._parts.reference is not None:
            scored = await with_reference(scored, self._parts.reference)
        del self._scoring[group.order]
        if not self._queue.holds(group.order):  # it became too old meanwhile
            return
        self._ledger.scored(group.order, scores_json(scored))
        self._tally.decided(scored, reason)
        if (alarm := self._alarm.observe(scored)) is not None:
            self._context.event("alarm", **alarm)
        self._source.observe(group.prompt.row.id, *passes_and_failures(scored, self._config.reward.correct_threshold))
        if reason is None:
            self._dropped_in_a_row = 0
            self._ready[group.order] = (scored, time.time())
            self._queue.ready(group.order)
        else:
            self._drop(scored, reason)

    @property
    def _idle_limit(self) -> int:
        """Groups dropped in a row after which there is no point in going on."""
        return self._config.stop_after_idle_steps * self._config.groups_per_step

    def _drop(self, scored: ScoredGroup, reason: Drop) -> None:
        self._queue.drop(scored.group.order)
        self._ledger.dropped(scored.group.order, str(reason))
        self._archive.add(scored, None, self._next_version, f"dropped:{reason}")
        self._dropped_in_a_row += 1
        limit = self._idle_limit
        if self._dropped_in_a_row >= limit:
            rewards = dict(Counter(scored.rewards))
            why = Counter(scored.reasons).most_common(1)[0][0]
            raise StageError(
                f"{limit} groups in a row taught nothing (the last: {reason}, rewards {rewards}, most often {why!r}); "
                "choose prompts of other difficulty (profile.band) or look at the reward"
            )

    def _drop_expired(self) -> None:
        """Spare groups that were not needed; in mode `drop`, groups that are too old for every batch to come."""
        reason = DropReason.STALE if self._config.staleness == "drop" else DropReason.SURPLUS
        for order in self._queue.expired():
            self._queue.drop(order)
            self._ledger.dropped(order, reason)
            flight, group = self._workers.cancel(order), self._scoring.get(order)
            if (ready := self._ready.pop(order, None)) is not None:
                self._archive.add(ready[0], None, self._next_version, f"dropped:{reason}")
                group = ready[0].group
            if group is not None:
                self._tally.expired(reason, group.prompt.row.id, [rollout.num_sampled for rollout in group.rollouts])
            elif flight is not None:
                self._tally.expired(reason, flight.prompt.row.id, [reply.num_sampled for reply in flight.replies])

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
                return over_batch(groups, self._config.advantage), list(ready_since)
            self._changed.clear()
            await self._changed.wait()

    async def _beside(self, work: Awaitable[T]) -> T:
        """Wait for something of the trainer while generation goes on."""
        waiting = asyncio.ensure_future(work)
        try:
            while not waiting.done():
                if self._failure is not None:
                    raise self._failure
                self._dispatch()
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({waiting, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            return waiting.result()
        finally:
            waiting.cancel()

    async def _one_step(self) -> None:
        waiting = time.time()
        batch, ready_since = await self._next_batch()
        now = time.time()
        step = self._next_version
        oldest = step - min(scored.group.oldest_version for scored in batch)
        if oldest > self._config.max_staleness:
            raise StageError(f"step {step}: a group is {oldest} versions old; the bound does not hold")
        self._next_version = step + 1
        self._drop_expired()  # the batch's places are free: generation goes on beside the step
        samples = train_samples(batch, step)
        result = await self._beside(self._trainer.async_step(samples, step))
        self._context.busy("trainer", "train", start=result.began, end=result.ended)
        await keep_evidence(self._config, self._context.dir, self._trainer, samples=samples, nonfinite=result.nonfinite)
        # Two segments are written in turn: the engines must have taken the last version before the next is written.
        await self._finish_update()
        self._update = self._start(self._workers.update(manifest_of(result), step + 1))
        self._ledger.trained([scored.group.order for scored in batch], step)
        for scored in batch:
            self._archive.add(scored, step, step, "trained")
        self._archive.write(step)
        self._archived_seq = self._ledger.seq
        ages_s = [now - since for since in ready_since]
        metrics = self._tally.values(step, batch, ages_s, now - waiting, result.metrics)
        self._tell(step, {**metrics, **self._source.advance(step + 1, metrics["pass_rate"])})
        if self._checkpoint_is_due(step + 1):
            await self._checkpoint(step + 1)

    async def _finish_update(self) -> None:
        if self._update is not None:
            await self._update
        await self._workers.settled()

    def _checkpoint_is_due(self, version: int) -> bool:
        """The last version needs none: it is the stage's result."""
        return version % self._config.checkpoint_every == 0 and version < self._config.steps

    async def _checkpoint(self, version: int) -> None:
        """Write a checkpoint beside generation, then commit it: from that transaction on it counts."""
        folder = self._context.dir / CHECKPOINTS / f"step_{version}"
        folder.parent.mkdir(exist_ok=True)
        aside = folder.parent / f".{SNAPSHOT}"
        archived_seq = self._archived_seq
        state = {
            "source": self._source.state(),
            "seq": self._ledger.seq,
            "next_order": self._queue.next_order,
        }

        async def write() -> str:
            await self._ledger.snapshot(aside)
            await self._trainer.async_save_checkpoint(folder, state)
            aside.rename(folder / SNAPSHOT)
            return await asyncio.to_thread(folder_hash, folder)

        digest = await self._beside(write())
        await self._ledger.commit(Commit(version, f"{CHECKPOINTS}/{folder.name}", digest), archived_seq)
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
            "engines_replaced": self._workers.num_replaced,
            **self._side.figures(),
        }
        self._tokens_sampled += values["tokens_generated"] + values.get("tokens_probed", 0)
        values["tokens_sampled_total"] = self._tokens_sampled
        self._context.metrics(step, values)
        shown = ("reward_mean", "pass_rate", "staleness_mean", "queue_groups", "generate_tokens_per_s")
        self._context.progress(
            step + 1,
            self._config.steps,
            "steps",
            values={
                **{name: values[name] for name in shown},
                "dropped_groups": values["groups_dropped_zero_advantage"],
            },
        )
