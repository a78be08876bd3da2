"""The loop of scoring: all groups that are sampled go to the reward together, and each goes on when it has its rewards.

sampled ──► rewards, advantages ──► dropped, or [log-probabilities of the reference] and ready
    ├── the first replies of a group ──► rewards ──► dropped (stopped), or dispatch.send: the others are sampled
    └── a group of side work ──► side.take

What a group waits for by itself, such as another try of the reward or the reference, is a task of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from posttrain.context import BusyLog
from posttrain.records import Scored
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.groups import (
    Scorer,
    all_scores,
    drop_reason,
    pairs_to_score,
    scored_again,
    scored_group,
    worth_a_try,
)
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.steps import wake_all
from posttrain.rl.records import Admission, Group, ScoredGroup
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
        self._rescores = config.reward.rescores
        self._scorer = scorer
        self._book = book
        self._reference = reference
        self._take_beside = take_beside
        self._go_on = go_on
        self._known: dict[int, Sequence[Scored]] = {}  # the scores of the first replies of groups that go on
        self._log = log
        self._changed = changed
        self._groups: list[Group] = []  # that are sampled, and not yet being scored
        self._flights: list[Flight] = []  # the same of side work
        self._has_some = asyncio.Event()

    def sampled(self, item: Group | Flight) -> None:
        """Queue a group, or the flight of one of side work, whose replies are all sampled."""
        if isinstance(item, Flight):
            self._flights.append(item)
        else:
            self._groups.append(item)
        self._has_some.set()

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Score the sampled groups. Runs until it is cancelled.

        This is a loop, not a call in `sampled`: a rollout may still end after the TaskGroup has failed, and then the
        TaskGroup refuses new tasks.
        """
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            flights, self._flights = self._flights, []
            groups, self._groups = self._groups, []
            for flight in flights:
                tasks.create_task(self._score_beside(flight))
            if groups:
                tasks.create_task(self._score(groups, tasks))

    async def _score_beside(self, flight: Flight) -> None:
        await self._take_beside(flight)
        wake_all(self._changed)

    async def _score(self, groups: Sequence[Group], tasks: asyncio.TaskGroup) -> None:
        """Score groups together. Each goes on when it has its scores."""
        began = time.time()
        waiting = dict(enumerate(groups))
        known = [self._known.pop(group.order, ()) for group in groups]

        def take(found: Sequence[tuple[int, Sequence[Scored]]]) -> None:
            self._log.add(began, time.time())
            for place, scores in found:
                group = waiting.pop(place)
                self._take(group, all_scores(group, scores, known[place]), tasks, num_known=len(known[place]))
            wake_all(self._changed)

        pairs = [pairs_to_score(group, len(first)) for group, first in zip(groups, known, strict=True)]
        await self._scorer.score_each(pairs, take)

    def _take(self, group: Group, scores: Sequence[Scored], tasks: asyncio.TaskGroup, *, num_known: int) -> None:
        if self._rescores and worth_a_try(group, scores, num_known):
            tasks.create_task(self._score_again(group, scores, num_known))
        elif (scored := self._decide(group, scores)) is not None:
            tasks.create_task(self._refer(scored))

    async def _score_again(self, group: Group, scores: Sequence[Scored], num_known: int) -> None:
        scores = await scored_again(group, scores, self._scorer, rescores=self._rescores, num_known=num_known)
        if (scored := self._decide(group, scores)) is not None:
            await self._refer(scored)
        wake_all(self._changed)

    def _decide(self, group: Group, scores: Sequence[Scored]) -> ScoredGroup | None:
        """Decide what becomes of a group. Returns it if it needs log-probabilities of the reference first."""
        scored = scored_group(group, scores, self._config)
        if len(scores) < self._config.group_size:
            if (left := self._book.first_scored(scored)) is not None:
                self._known[group.order] = scores
                self._go_on(left, group.rollouts[0].worker)
            return None
        reason = drop_reason(scored, self._config)
        if reason is None and self._reference is not None:
            return scored
        self._book.scored(scored, reason)
        return None

    async def _refer(self, scored: ScoredGroup) -> None:
        assert self._reference is not None
        self._book.scored(await with_reference(scored, self._reference), None)
        wake_all(self._changed)
