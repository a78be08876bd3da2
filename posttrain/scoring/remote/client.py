"""The reward as a stage uses it: it scores pairs, and replaces an actor that dies or freezes.

    score() ──► ActorLife.score ──► scores
       ▲             │ the actor died or froze
       └── again ◄── a new ActorLife, started by the first call that needs it; all others wait for it

A scoring that was lost with an actor is sent to the next one; the loss of an actor never becomes a score.
"""

import asyncio
from collections.abc import Sequence

from posttrain.actors.losses import ActorLostError
from posttrain.config.resources import RewardResources
from posttrain.config.rewards import RewardConfig
from posttrain.errors import PluginError, StageError
from posttrain.records import Outcome, Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.pool.stats import PoolStats
from posttrain.scoring.remote.life import ActorLife

MAX_RESTARTS = 5
DEADLINE_S = 30.0


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

    async def score(self, pairs: Sequence[tuple[Rollout, Row]]) -> list[Scored]:
        """The scores of the pairs, in order, from one call of the actor. Raises StageError if no actor stays alive."""
        if not self._is_open:
            raise RuntimeError("start the client before scoring")
        if not pairs:
            return []
        reason = ""
        for _ in range(MAX_RESTARTS + 1):
            try:
                life = await self._living()
                scores = await life.score(pairs)
            except ActorLostError as error:
                reason = f"the reward actor was lost: {error}"
                if self._is_open:
                    continue
                break
            if any(scored.result is not None for scored in scores):
                self._lost_in_a_row = 0
            return scores
        return [Scored(None, Outcome.INFRASTRUCTURE, reason)] * len(pairs)

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
