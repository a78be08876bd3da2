"""The loop of optimizer steps.

book.take ──► trainer makes the step ──► engines load the new weights while the trainer makes the next step
   ▲                                ├──► book.trained writes the step to the disk, also meanwhile
   │                                └──► metrics ──► checkpoint, commit
   └ waits here for generation, and nowhere else
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.rl.grading.groups import over_batch
from posttrain.rl.loop.balance import ThreadBalance
from posttrain.rl.loop.checkpoints import Checkpoints
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Batch, ScoredGroup
from posttrain.rl.training.client import TrainerClient, manifest_of
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.evidence import keep_evidence
from posttrain.rl.training.samples import train_samples
from posttrain.sampling.workers import RolloutWorkers


class Steps:
    """Makes optimizer steps `first_step` to `config.steps` - 1.

    max_staleness: the bound that every batch is checked against. shares: those of the quotas at the start. changed: is
    set when a batch may have become complete, and this loop sets it when there is room for new groups. tell: is called
    with the number of each step and its metrics. balance: decides how many threads the trainer has; None: that stays.
    """

    def __init__(
        self,
        config: TrainingConfig,
        context: StageContext,
        trainer: TrainerClient,
        *,
        max_staleness: int,
        first_step: int,
        book: GroupBook,
        workers: RolloutWorkers,
        source: PromptSource,
        shares: Mapping[str, float],
        tally: StepTally,
        checkpoints: Checkpoints,
        changed: asyncio.Event,
        tell: Callable[[int, dict[str, Any]], None],
        balance: ThreadBalance | None = None,
    ):
        self._config = config
        self._context = context
        self._trainer = trainer
        self._max_staleness = max_staleness
        self._book = book
        self._workers = workers
        self._source = source
        self._shares = shares
        self._tally = tally
        self._checkpoints = checkpoints
        self._changed = changed
        self._tell = tell
        self._balance = balance
        self._update: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None
        self.next_version = first_step  # the version at which the next batch will be trained on

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Make all steps. tasks: for the updates of the engines, of which the last may still run at the end, and for
        what is written about a step.
        """
        while self.next_version < self._config.steps:
            await self._one_step(tasks)

    async def finish_update(self) -> None:
        """Wait until every engine has the weights of the last step that was made."""
        if self._update is not None:
            await self._update
        await self._workers.weights.settled()

    async def _next_batch(self) -> Batch:
        """Wait for the next batch. Training waits for generation only here."""
        while True:
            if (batch := self._book.take(self.next_version)) is not None:
                return batch
            await self._changed.wait()

    async def _one_step(self, tasks: asyncio.TaskGroup) -> None:
        waiting = time.time()
        batch = await self._next_batch()
        now = time.time()
        step = self.next_version
        groups = over_batch(batch.groups, self._config.advantage)
        self._check_staleness(groups, step)
        self.next_version = step + 1
        self._book.drop_expired(self._workers.cancel)
        # The batch has left the queue, so there is room for new groups while the trainer makes the step.
        wake_all(self._changed)
        samples = train_samples(groups, step)
        result = await self._trainer.async_step(samples, step)
        self._context.busy("trainer", "train", start=result.began, end=result.ended)
        await keep_evidence(self._config, self._context.dir, self._trainer, samples=samples, nonfinite=result.nonfinite)
        # The trainer writes weights to two segments of memory in turn. So all engines must have taken one version
        # before the trainer writes the version after the next.
        await self.finish_update()
        self._update = tasks.create_task(self._workers.weights.update(manifest_of(result), step + 1))
        await self._recorded()  # the step before: so the memory of one step at most waits for a slow disk
        self._recording = tasks.create_task(self._book.trained(groups, step))
        ages_s = [now - since for since in batch.ready_since]
        metrics = self._tally.values(step, groups, ages_s=ages_s, waited_s=now - waiting, trained=result.metrics)
        self._tell(step, {**metrics, **self._source.advance(step + 1)})
        if self._balance is not None and self._balance.measured(metrics):
            await self._trainer.async_set_threads(self._balance.threads)
            self._context.event("trainer_threads", step=step + 1, threads=self._balance.threads)
        if (moved := self._source.moved(self._shares)) is not None:
            self._book.move(moved)
        if self._checkpoints.is_due(step + 1):
            state = {"source": self._source.state(), **self._book.position()}
            await self._recorded()  # a commit lets the ledger forget the replies of dropped groups
            await self._checkpoints.write(step + 1, state, archived_seq=self._book.archived_seq)

    async def _recorded(self) -> None:
        """Wait until the steps so far are on the disk: in the archive and in the ledger."""
        if self._recording is not None:
            await self._recording

    def _check_staleness(self, groups: Sequence[ScoredGroup], step: int) -> None:
        oldest = step - min(scored.group.oldest_version for scored in groups)
        if oldest > self._max_staleness:
            raise StageError(f"step {step}: a group is {oldest} versions old; the bound does not hold")


def wake_all(changed: asyncio.Event) -> None:
    """Let all go on that wait for this event now."""
    changed.set()
    changed.clear()
