"""The reward pool as a Ray actor, so that scoring costs the controller's process nothing. `life` holds one, `client`
is what a stage uses.

    client ── score([(rollout, row), ...]) ──► RewardActor ── one by one ──► RewardPool ──► reward processes
           ◄── the scores, and how the pool is ──

Many calls are in progress at once; each waits for its own rollouts only.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.errors import PluginError
from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.plugins import RewardSpec
from posttrain.scoring.pool import PoolStats, RewardPool

# In the environment of the reward processes and of all they start: which actor they belong to.
MARK = "POSTTRAIN_REWARD_ACTOR"


@dataclass(frozen=True, slots=True)
class Health:
    """What an actor tells of itself with every answer. pids: of its reward processes."""

    pids: tuple[int, ...] = ()
    stats: PoolStats = field(default_factory=PoolStats)


class RewardActor:
    """Holds a pool. mark: value of MARK for its processes; folder: where relative paths of plug-ins begin."""

    def __init__(self, spec: RewardSpec, num_workers: int, timeout_s: float, mark: str, folder: str):
        os.environ[MARK] = mark
        with contextlib.suppress(OSError):  # another node need not have it
            os.chdir(folder)
        self._pool = RewardPool(spec, num_workers, timeout_s)

    async def where(self) -> tuple[str, int]:
        """The node's id in Ray, and this process's."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def start(self) -> str:
        """Starts the reward processes. Returns "" or why they cannot load the plug-in."""
        try:
            await self._pool.start()
        except PluginError as error:
            return str(error)
        return ""

    async def score(self, pairs: Sequence[tuple[Rollout, Row]]) -> tuple[list[Scored], Health]:
        """The scores in order."""
        scores = await asyncio.gather(*(self._pool.score(rollout, row) for rollout, row in pairs))
        return scores, await self.ping()

    async def ping(self) -> Health:
        """Answers as long as the actor lives."""
        return Health(tuple(self._pool.pids), self._pool.stats)

    async def close(self) -> None:
        """Ends the reward processes."""
        await self._pool.close()
