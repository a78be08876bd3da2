"""The controller of asynchronous RL: asyncio loops that move records between engines, reward actor and trainer.

    prompts ──► dispatch ──► engines (vLLM actors) ──► [judge] ──► reward actor ──► [reference] ──► group
                   ▲                                                     │ zero advantage, unscored: dropped,
                   │ room in the queue                                   │ its place free at once
                   └──────────────── StalenessQueue ◄────────────────────┘
                                          │ a whole batch, in dispatch order; the trainer waits only here
                                          ▼
                     engines ◄── weights v+1 ── trainer (its own ranks): step ──► metrics, checkpoint, commit

Parts in brackets are optional. The judge runs on engines or behind an endpoint, the reference in a process of its own.

All loops run in one TaskGroup, so the first failure ends all of them:

    workers.run        feeds the engines, fetches what they sampled, replaces those that are lost
    _dispatch_groups   admits groups whenever there is room
    _begin_scoring     starts a task for each sampled group: rewards, advantages, whether it is trained on
    _train             takes a batch, has the trainer make a step, sends the new weights; the only loop that waits for
                       generation
    _update            is one task for each new version. An engine loads it between two of its own steps, while its
                       requests are in flight and the trainer makes the next step
    _keep_ledger       writes the changes of the ledger to the disk
    _watch_reward      shows, beside the progress, that deadlines of the reward pass

The loops share the `GroupBook`, which is the only place where the state of a group changes.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from posttrain.actors.garbage import rare_collections
from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.records import DrawnPrompt
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.groups import drop_reason, over_batch, score_group
from posttrain.rl.grading.judge import Judge, rewards
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import Survivor
from posttrain.rl.loop.checkpoints import Checkpoints
from posttrain.rl.loop.group_book import Admission, Batch, GroupBook
from posttrain.rl.loop.side import SideWork
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.tally import REASONS, StepTally, sampled_before
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Group, LedgerEvent, ScoredGroup
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
from posttrain.sampling.scoring import LOOK_S, lateness
from posttrain.sampling.workers import RolloutWorkers

FLUSH_S = 0.05  # pause between two writes of the ledger: a SIGKILL loses the changes since the last one


@dataclass(frozen=True, slots=True)
class Parts:
    """The actors and stores that the controller works with.

    shares: the share of each capability in a batch. stop_ids: token ids that end a reply. heldout: the prompts of
    `evaluation`. profile: the measured pass rates of the prompts. num_set_aside: how many prompts the profile
    could not score.
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
    num_set_aside: int = 0


class _LastStepDone(Exception):
    """Ends the TaskGroup after the last step. The other loops have no end of their own."""


class Controller:
    """Runs optimizer steps `first_step` to `steps` - 1.

    At the start the engines have policy version `first_step`, whose weights are `manifest`. survivors: groups from
    before a crash, the oldest stamp first.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        parts: Parts,
        *,
        manifest: Manifest,
        first_step: int = 0,
        survivors: Sequence[Survivor] = (),
    ):
        self._config = config
        self._context = context
        self._parts = parts
        self._next_version = first_step  # the version at which the next batch will be trained on
        self._steps_done = first_step
        self._shown: dict[str, float | str] = {}  # figures of the last step, beside the progress
        self._survivors = survivors
        self._changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._unscored: asyncio.Queue[Group | Flight] = asyncio.Queue()  # also flights of side work
        self._update: asyncio.Task[None] | None = None
        self._workers = RolloutWorkers(
            context,
            parts.engines,
            deadline_s=config.engine.deadline_s,
            finished=self._sampled,
            begun=self._sampled_so_far,
            calls=partial(update_calls, config),
            manifest=manifest,
            version=first_step,
            took=self._took,
            replaced=self._replaced,
            wave_seed=partial(wave_seed, context.seed) if config.deterministic else None,
        )
        self._reward_log = BusyLog(context, "reward", "score")
        self._scorer = rewards(config, parts.judge)
        self._tally = StepTally(
            {**{worker.name: worker.log for worker in self._workers.workers}, "reward": self._reward_log}
            | (dict(parts.judge.logs) if parts.judge is not None else {}),
            {item.prompt_id: item.pass_rate for item in parts.profile},
            config.reward.correct_threshold,
        )
        self._tokens_sampled = sampled_before(context.dir, sum(item.tokens for item in parts.profile))
        self._book = GroupBook(
            config,
            context,
            _queue(config, parts, first_step),
            ledger=parts.ledger,
            archive=parts.archive,
            tally=self._tally,
            source=parts.source,
            idle_steps=config.stop_after_idle_steps,
            version=first_step,
        )
        self._checkpoints = Checkpoints(
            context.dir, parts.ledger, parts.trainer, every=config.checkpoint_every, steps=config.steps
        )
        self._side = SideWork(
            config,
            context,
            self._workers,
            scorer=self._scorer,
            source=parts.source,
            version=first_step,
            evaluation=config.evaluation,
            heldout=parts.heldout,
            stop_ids=parts.stop_ids,
            told=parts.ledger.event,
        )

    async def run(self) -> None:
        """Train to the last step. If a loop fails, its exception is raised; of several failures, the first."""
        await self._scorer.start()
        with rare_collections():
            try:
                await self._run_loops()
            finally:
                await self._scorer.close()
                self._reward_log.flush()
                await self._parts.ledger.flush()

    def finish(self) -> None:
        """Drop the groups that are still undecided. It is called once, after the last step."""
        self._book.finish()

    async def _run_loops(self) -> None:
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._workers.run())
                self._tasks.create_task(self._keep_ledger())
                self._tasks.create_task(self._begin_scoring())
                self._go_on_with(self._survivors)
                self._tasks.create_task(self._dispatch_groups())
                self._tasks.create_task(self._train())
                self._tasks.create_task(self._watch_reward())
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]  # the others may be its consequences
        if failure is not None and not isinstance(failure, _LastStepDone):
            raise failure

    async def _keep_ledger(self) -> None:
        while True:
            await self._parts.ledger.flush()
            await asyncio.sleep(FLUSH_S)

    async def _watch_reward(self) -> None:
        told = 0
        while True:
            await asyncio.sleep(LOOK_S)
            if (found := self._scorer.stats.num_timeouts) > told:
                told = found
                self._progress()

    def _something_changed(self) -> None:
        """Wake the loops that wait for room in the queue or for a complete batch."""
        self._changed.set()
        self._changed.clear()

    # ------------------------------------------------------------------ generation

    def _go_on_with(self, survivors: Iterable[Survivor]) -> None:
        for survivor in survivors:
            rest = self._book.adopt(survivor)
            if isinstance(rest, Admission):
                self._send(rest)
            elif rest is not None:
                self._unscored.put_nowait(rest)

    async def _dispatch_groups(self) -> None:
        while True:
            self._dispatch()
            await self._changed.wait()

    def _dispatch(self) -> None:
        """Admit as many groups as there is room for.

        A deterministic run admits them in waves: the next one begins when no group of the last one is in flight.
        """
        if self._config.deterministic and self._book.num_in_flight:
            return
        self._side.dispatch(self._next_version)
        for _ in range(self._book.room(self._workers.oldest_version)):
            self._send(self._book.admit(self._workers.oldest_version))

    def _send(self, admission: Admission) -> None:
        request = self._request(admission.prompt)
        self._workers.send(Flight(admission.order, admission.stamp, admission.prompt, request, admission.recorded))

    def _request(self, prompt: DrawnPrompt) -> SampleRequest:
        config = self._config
        return sample_request(config.sampling, prompt, config.group_size, stop_ids=self._parts.stop_ids)

    def _took(self, worker: str, version: int) -> None:
        self._parts.ledger.event(LedgerEvent.WEIGHTS_TAKEN, [worker, version])
        self._something_changed()

    def _replaced(self, worker: str, reason: str) -> None:
        self._parts.ledger.event(LedgerEvent.ENGINE_REPLACED, [worker, reason])
        self._something_changed()

    def _sampled_so_far(self, flight: Flight) -> None:
        if flight.order >= 0:
            self._book.sampled_so_far(flight)

    def _sampled(self, flight: Flight) -> None:
        self._unscored.put_nowait(self._book.generated(flight) if flight.order >= 0 else flight)

    # ------------------------------------------------------------------ scoring

    async def _begin_scoring(self) -> None:
        """Start a task for each sampled group.

        This is a loop, not a call in `_sampled`: a rollout may still end after the TaskGroup has failed, and then the
        group refuses new tasks.
        """
        while True:
            sampled = await self._unscored.get()
            work = self._take_beside(sampled) if isinstance(sampled, Flight) else self._score(sampled)
            self._tasks.create_task(work)

    async def _take_beside(self, flight: Flight) -> None:
        await self._side.take(flight)
        self._something_changed()

    async def _score(self, group: Group) -> None:
        began = time.time()
        scored = await score_group(group, self._scorer, self._config)
        self._reward_log.add(began, time.time())
        reason = drop_reason(scored, self._config)
        if reason is None and self._parts.reference is not None:
            scored = await with_reference(scored, self._parts.reference)
        self._book.scored(scored, reason)
        self._something_changed()

    # ------------------------------------------------------------------ training

    async def _train(self) -> None:
        while self._next_version < self._config.steps:
            await self._one_step()
        self._side.stop()
        await self._finish_update()
        raise _LastStepDone

    async def _next_batch(self) -> Batch:
        """Wait for the next batch. Training waits for generation only here."""
        while True:
            if (batch := self._book.take(self._next_version)) is not None:
                return batch
            await self._changed.wait()

    async def _one_step(self) -> None:
        waiting = time.time()
        batch = await self._next_batch()
        now = time.time()
        step = self._next_version
        groups = over_batch(batch.groups, self._config.advantage)
        self._check_staleness(groups, step)
        self._next_version = step + 1
        self._book.drop_expired(self._workers.cancel)
        # The batch has left the queue, so there is room for new groups while the trainer makes the step.
        self._something_changed()
        samples = train_samples(groups, step)
        result = await self._parts.trainer.async_step(samples, step)
        self._context.busy("trainer", "train", start=result.began, end=result.ended)
        await keep_evidence(
            self._config, self._context.dir, self._parts.trainer, samples=samples, nonfinite=result.nonfinite
        )
        # The trainer writes weights to two segments of memory in turn. So all engines must have taken one version
        # before the trainer writes the version after the next.
        await self._finish_update()
        self._update = self._tasks.create_task(self._workers.weights.update(manifest_of(result), step + 1))
        self._book.trained(groups, step)
        ages_s = [now - since for since in batch.ready_since]
        metrics = self._tally.values(step, groups, ages_s=ages_s, waited_s=now - waiting, trained=result.metrics)
        self._tell(step, {**metrics, **self._parts.source.advance(step + 1, metrics["pass_rate"])})
        if self._checkpoints.is_due(step + 1):
            state = {"source": self._parts.source.state(), **self._book.position()}
            await self._checkpoints.write(step + 1, state, archived_seq=self._book.archived_seq)

    def _check_staleness(self, groups: Sequence[ScoredGroup], step: int) -> None:
        oldest = step - min(scored.group.oldest_version for scored in groups)
        if oldest > self._config.max_staleness:
            raise StageError(f"step {step}: a group is {oldest} versions old; the bound does not hold")

    async def _finish_update(self) -> None:
        if self._update is not None:
            await self._update
        await self._workers.weights.settled()

    # ------------------------------------------------------------------ what is told

    def _tell(self, step: int, metrics: dict[str, Any]) -> None:
        values = {
            **metrics,
            **self._book.figures(),
            "engines_replaced": self._workers.num_replaced,
            **self._side.figures(),
            **({"prompts_set_aside": self._parts.num_set_aside} if self._parts.num_set_aside else {}),
        }
        self._tokens_sampled += values["tokens_generated"] + values.get("tokens_probed", 0)
        values["tokens_sampled_total"] = self._tokens_sampled
        self._context.metrics(step, values)
        shown = ("reward_mean", "pass_rate", "staleness_mean", "queue_groups", "generate_tokens_per_s")
        self._shown = {
            **{name: values[name] for name in shown},
            "dropped_groups": sum(values[f"groups_dropped_{reason}"] for reason in REASONS),
        }
        self._steps_done = step + 1
        self._progress()

    def _progress(self) -> None:
        """Write the event: the figures of the last step, and the timeouts of the reward."""
        values = {**self._shown, **lateness(self._scorer.stats)}
        self._context.progress(self._steps_done, self._config.steps, "steps", values=values)


def _queue(config: RlConfig, parts: Parts, first_step: int) -> StalenessQueue:
    return StalenessQueue(
        config.groups_per_step,
        config.max_staleness,
        parts.shares,
        refills=config.mixture_refills,
        version=first_step,
        mode=config.staleness,
        first_order=parts.ledger.next_order,
        over_provision=0.0 if config.deterministic else config.over_provision,
    )
