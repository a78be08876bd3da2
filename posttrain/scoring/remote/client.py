"""The reward as a stage uses it: it scores pairs, and replaces an actor that dies or freezes.

    score_each() ──► ActorLife.scoring ──► the scores of each group, as they come
       ▲                  │ the actor died or froze
       └── the rest ◄──── a new ActorLife, started by the first call that needs it; all others wait for it

A scoring that was lost with an actor is sent to the next one; the loss of an actor never becomes a score.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from posttrain.actors.losses import ActorLostError
from posttrain.config.resources import RewardResources
from posttrain.config.rewards import RewardConfig
from posttrain.errors import PluginError, StageError
from posttrain.records import Outcome, Scored
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.pool.stats import PoolStats
from posttrain.scoring.remote.life import ActorLife
from posttrain.scoring.remote.messages import Pair

MAX_RESTARTS = 5
DEADLINE_S = 30.0
TakeScores = Callable[[Sequence[tuple[int, Sequence[Scored]]]], None]  # places of groups, with their scores
ScoreEach = Callable[[Sequence[Sequence[Pair]], TakeScores], Awaitable[None]]


class RewardClient:
    """A reward pool in a Ray actor of its own. Must be used inside an initialised Ray session.

    deadline_s: an actor that does not answer for so many seconds is killed and replaced. num_restarts: how often that
    has happened.
    """

    def __init__(self, reward: RewardConfig, resources: RewardResources, deadline_s: float = DEADLINE_S):
        self.spec = RewardSpec(reward.name, reward.args, reward.python or "")
        self.num_processes = reward.workers
        self.timeout_s = reward.timeout_s
        self._resources = resources
        self._deadline_s = deadline_s
        self._life: ActorLife | None = None
        self._past = PoolStats()
        self._lost_in_a_row = 0
        self._replacing = asyncio.Lock()
        self._is_open = False
        self.num_restarts = 0

    @property
    def stats(self) -> PoolStats:
        """The counts of the pools of all actors so far, from their last answers, which are at most a second old."""
        return self._past if self._life is None else self._past + self._life.health.stats

    def pids(self) -> list[int]:
        """The process ids of the actor (if it is on this node) and of its reward processes, from its last answer."""
        return [] if self._life is None else self._life.pids

    async def start(self) -> None:
        """Start the actor and its processes. Raises PluginError if the reward cannot be loaded, StageError if an actor
        cannot be started.
        """
        check_reward(self.spec.name, self.spec.args, python=self.spec.python)
        self._is_open = True
        try:
            await self._living()
        except BaseException:
            await self.close()
            raise

    async def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """The scores of the pairs, in order, as those of one group of `score_each`."""
        return await score_together(self.score_each, pairs)

    async def score_each(self, groups: Sequence[Sequence[Pair]], take: TakeScores) -> None:
        """Score groups of pairs. `take` is called with the place and the scores of each, as soon as it has them.

        The replies to one prompt belong into one group. Raises StageError if no actor stays alive.
        """
        if not self._is_open:
            raise RuntimeError("start the client before scoring")
        left = {place: pairs for place, pairs in enumerate(groups) if pairs}
        if len(left) < len(groups):
            take([(place, []) for place, pairs in enumerate(groups) if not pairs])
        losses, reason = 0, ""
        while left and losses <= MAX_RESTARTS:
            try:
                with (await self._living()).scoring(left) as awaited:
                    while left:
                        found = await awaited.some()
                        losses = 0
                        self._note(found)
                        for place, _ in found:
                            del left[place]
                        take(found)
            except ActorLostError as error:
                losses += 1
                reason = f"the reward actor was lost: {error}"
                if not self._is_open:
                    break
        if left:
            lost = Scored(None, Outcome.INFRASTRUCTURE, reason)
            take([(place, [lost] * len(pairs)) for place, pairs in left.items()])

    def _note(self, found: Iterable[tuple[int, Sequence[Scored]]]) -> None:
        if any(scored.result is not None for _, scores in found for scored in scores):
            self._lost_in_a_row = 0

    async def close(self) -> None:
        """End the actor and its processes. Unfinished scores get outcome `infrastructure`."""
        self._is_open = False
        async with self._replacing:
            life, self._life = self._life, None
            if life is not None:
                await life.close()
                self._past += life.health.stats

    async def _living(self) -> ActorLife:
        """The actor, or a new one if it was lost."""
        if self._life is not None and not self._life.is_lost and not self._replacing.locked():
            return self._life
        async with self._replacing:
            while self._life is None or self._life.is_lost:
                if not self._is_open:
                    raise ActorLostError("the client was closed")
                await self._begin()
            return self._life

    async def _begin(self) -> None:
        lost = self._life
        if lost is not None:
            if self._lost_in_a_row == MAX_RESTARTS:
                raise StageError(
                    f"the reward actor was lost {MAX_RESTARTS + 1} times without one score in between; {lost.reason}"
                )
            self._lost_in_a_row += 1
            self.num_restarts += 1
            self._past += lost.health.stats
        self._life = ActorLife(
            self.spec, self.num_processes, self.timeout_s, resources=self._resources, deadline_s=self._deadline_s
        )
        try:
            await self._life.start()
        except ActorLostError:
            return
        except PluginError as error:
            if lost is None:
                raise
            await self._life.close()
            raise StageError(f"the reward could not be loaded again: {error}") from error


async def score_together(score_each: ScoreEach, pairs: Sequence[Pair]) -> list[Scored]:
    """The scores of the pairs, in order, as one group."""
    found: list[Scored] = []

    def take(scored: Sequence[tuple[int, Sequence[Scored]]]) -> None:
        found.extend(scored[0][1])

    await score_each([pairs], take)
    return found
