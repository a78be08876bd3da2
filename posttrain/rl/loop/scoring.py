"""The loop of scoring: a task for each sampled group, from its rewards to the decision whether it is trained on.

sampled ──► rewards, advantages ──► dropped, or [log-probabilities of the reference] and ready
    ├── the first replies of a group ──► rewards ──► dropped (stopped), or dispatch.send: the others are sampled
    └── a group of side work ──► side.take
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from posttrain.context import BusyLog
from posttrain.records import Scored
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.groups import Scorer, drop_reason, scored_group, scores_of
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.steps import wake_all
from posttrain.rl.records import Admission, Group
from posttrain.rl.training.reference import AdaptersOff, Reference, with_reference
from posttrain.sampling.rollouter import Flight


class Scoring:
    """Scores groups, and tells the book of it.

    take_beside: takes a sampled group of side work. go_on: has the other replies of a group sampled, by the worker of
    this name if it can. log: when the scorer was busy. changed: is set after each group.
    """

    def __init__(
        self,
        config: GradingConfig,
        scorer: Scorer,
        book: GroupBook,
        *,
        reference: Reference | AdaptersOff | None,
        take_beside: Callable[[Flight], Awaitable[None]],
        go_on: Callable[[Admission, str], None],
        log: BusyLog,
        changed: asyncio.Event,
    ):
        self._config = config
        self._scorer = scorer
        self._book = book
        self._reference = reference
        self._take_beside = take_beside
        self._go_on = go_on
        self._known: dict[int, list[Scored]] = {}  # the scores of the first replies of groups that go on
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
        known = self._known.pop(group.order, [])
        scores = await scores_of(group, self._scorer, self._config, known=known)
        self._log.add(began, time.time())
        scored = scored_group(group, scores, self._config)
        if len(scores) < self._config.group_size:
            if (left := self._book.first_scored(scored)) is not None:
                self._known[group.order] = scores
                self._go_on(left, group.rollouts[0].worker)
            return
        reason = drop_reason(scored, self._config)
        if reason is None and self._reference is not None:
            scored = await with_reference(scored, self._reference)
        self._book.scored(scored, reason)
