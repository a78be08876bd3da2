"""Groups that are scored as soon as they are sampled, and the progress of that, which counts what is scored.

    flights ─► SampledGroups ─► a group is sampled ─► score ─► ScoringProgress.scored
                                                        └ late ─► ScoringProgress tells of timeouts by itself

So a reward that hangs is seen while it hangs, and not as a stage that stands still at its last prompt.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType

from posttrain.context import StageContext
from posttrain.metrics.unscored import Unscored, failures
from posttrain.records import Rollout, Row, Scored
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.rollouter import Flight
from posttrain.scoring.pool.stats import PoolStats

Score = Callable[[Sequence[tuple[Rollout, Row]]], Awaitable[Sequence[Scored]]]
LOOK_S = 2.0  # between two looks at the timeouts
TELL_S = 10.0  # at most between two events of progress, though nothing changed


def lateness(stats: PoolStats) -> dict[str, str]:
    """A value to show beside the progress: the deadlines of the reward that passed; {} if none did."""
    return {"reward:": stats.lateness} if stats.lateness else {}


class ScoringProgress:
    """Tells how many of `total` groups are scored: at each score, and every few seconds in between.

    unit: what a group is, such as "prompts". stats: of the reward, at any time. phase: shown beside the progress.
    unscored: counts what could not be scored.
    """

    def __init__(
        self,
        context: StageContext,
        total: int,
        unit: str,
        *,
        stats: Callable[[], PoolStats],
        unscored: Unscored,
        phase: str = "",
    ):
        self._context = context
        self._total = total
        self._unit = unit
        self._stats = stats
        self._phase = phase
        self._num_sampled = self._num_scored = 0
        self._told_s = time.monotonic()
        self._told_timeouts = 0
        self._watching: asyncio.Task[None]
        self._unscored = unscored

    async def __aenter__(self) -> "ScoringProgress":
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def sampled(self) -> None:
        """A group has all its rollouts."""
        self._num_sampled += 1

    def scored(self, row: str, scores: Sequence[Scored]) -> None:
        """A group has its scores."""
        self._num_scored += 1
        self._unscored.add(row, failures(scores), len(scores))
        self.tell()

    def tell(self) -> None:
        """Write the event."""
        self._told_s = time.monotonic()
        stats = self._stats()
        self._told_timeouts = stats.num_timeouts
        waiting, lost = self._num_sampled - self._num_scored, len(self._unscored.lost)
        values = {
            **({"phase": self._phase} if self._phase else {}),
            **({"waiting for a score": waiting} if waiting else {}),
            **({"unscored": lost} if lost else {}),
            **lateness(stats),
        }
        self._context.progress(self._num_scored, self._total, self._unit, values=values)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            is_late = time.monotonic() - self._told_s >= TELL_S
            if self._num_sampled > self._num_scored and (is_late or self._stats().num_timeouts > self._told_timeouts):
                self.tell()


async def score_others(pairs: Sequence[tuple[Rollout, Row]], score: Score) -> list[Scored]:
    """The scores in order: of an episode the score that its environment gave it, of all other rollouts by `score`."""
    others = [pair for pair in pairs if pair[0].scored is None]
    if len(others) == len(pairs):
        return list(await score(pairs)) if pairs else []
    scores = iter(await score(others) if others else ())
    return [rollout.scored or next(scores) for rollout, _ in pairs]


async def score_each(
    sampled: SampledGroups,
    flights: Iterable[Flight],
    score: Score,
    *,
    progress: ScoringProgress,
    take: Callable[[Flight, Sequence[Scored]], None],
) -> None:
    """Have the rollouts of each flight sampled and scored, and hand it to `take` with the scores of its rollouts.

    flights: each is made when there is room for it, and is not kept. Raises what `SampledGroups.groups`, `score` and
    `take` raise.
    """

    async def score_one(flight: Flight) -> None:
        found = await score_others([(rollout, flight.prompt.row) for rollout in flight.rollouts], score)
        progress.scored(flight.prompt.row.id, found)
        take(flight, found)

    def begin(flight: Flight) -> None:
        progress.sampled()
        tasks.create_task(score_one(flight))

    try:
        async with asyncio.TaskGroup() as tasks:
            await sampled.groups(flights, begin)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def sample_and_score(
    sampled: SampledGroups, flights: Sequence[Flight], score: Score, *, progress: ScoringProgress
) -> list[Sequence[Scored]]:
    """The scores of each flight's rollouts, in order. Raises what `score_each` raises."""
    scores: dict[int, Sequence[Scored]] = {}

    def take(flight: Flight, found: Sequence[Scored]) -> None:
        scores[flight.order] = found

    await score_each(sampled, flights, score, progress=progress, take=take)
    return [scores[flight.order] for flight in flights]
