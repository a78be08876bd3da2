"""The loop of scoring: a task for each sampled group, from its rewards to the decision whether it is trained on.

sampled ──► rewards, advantages ──► dropped, or [log-probabilities of the reference] and ready
    └── a group of side work ──► side.take
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from posttrain.context import BusyLog
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.groups import Scorer, drop_reason, score_group
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.steps import wake_all
from posttrain.rl.records import Group
from posttrain.rl.training.reference import AdaptersOff, Reference, with_reference
from posttrain.sampling.rollouter import Flight


class Scoring:
    """Scores groups, and tells the book of it.

    take_beside: takes a sampled group of side work. log: when the scorer was busy. changed: is set after each group.
    """

    def __init__(
        self,
        config: GradingConfig,
        scorer: Scorer,
        book: GroupBook,
        *,
        reference: Reference | AdaptersOff | None,
        take_beside: Callable[[Flight], Awaitable[None]],
        log: BusyLog,
        changed: asyncio.Event,
    ):
        self._config = config
        self._scorer = scorer
        self._book = book
        self._reference = reference
        self._take_beside = take_beside
        self._log = log
        self._changed = changed
        self._sampled: asyncio.Queue[Group | Flight] = asyncio.Queue()  # flights are of side work

    def sampled(self, item: Group | Flight) -> None:
        """Queue a group, or the flight of one of side work, whose replies are all sampled."""
        self._sampled.put_nowait(item)

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Start a task for each sampled group. Runs until it is cancelled.

        This is a loop, not a call in `sampled`: a rollout may still end after the TaskGroup has failed, and then the
        TaskGroup refuses new tasks.
        """
        while True:
            tasks.create_task(self._take(await self._sampled.get()))

    async def _take(self, item: Group | Flight) -> None:
        if isinstance(item, Flight):
            await self._take_beside(item)
        else:
            await self._score(item)
        wake_all(self._changed)

    async def _score(self, group: Group) -> None:
        began = time.time()
        scored = await score_group(group, self._scorer, self._config)
        self._log.add(began, time.time())
        reason = drop_reason(scored, self._config)
        if reason is None and self._reference is not None:
            scored = await with_reference(scored, self._reference)
        self._book.scored(scored, reason)
