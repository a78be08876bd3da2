"""The reward pool as a Ray actor, so that scoring costs the controller's process nothing. `life` holds one, `client`
is what a stage uses.

    client ── submit: any number of scorings ──► RewardActor ── one by one ──► RewardPool ──► reward processes
           ◄── collect: those that are done, and how the pool is ──

A scoring is any number of rollouts under one key; each waits for its own rollouts only. One call for many of them: a
call between processes costs more than a score.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass, field

from posttrain.actors.processes import place_of_this
from posttrain.errors import PluginError
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.target import describe
from posttrain.scoring.pool.pool import PoolStats, RewardPool
from posttrain.scoring.remote.messages import Done, pack_done, unpack_scorings

# In the environment of the reward processes and of all they start: which actor they belong to.
MARK = "POSTTRAIN_REWARD_ACTOR"


@dataclass(frozen=True, slots=True)
class Health:
    """What an actor reports of itself with every answer. pids: of its reward processes."""

    pids: tuple[int, ...] = ()
    stats: PoolStats = field(default_factory=PoolStats)


class RewardActor:
    """Holds a pool. mark: value of MARK for its processes; folder: where relative paths of plug-ins begin."""

    def __init__(self, spec: RewardSpec, num_processes: int, timeout_s: float, *, mark: str, folder: str):
        os.environ[MARK] = mark
        with contextlib.suppress(OSError):  # another node need not have it
            os.chdir(folder)
        self._pool = RewardPool(spec, num_processes, timeout_s)
        self._done: list[Done] = []
        self._event = asyncio.Event()

    async def where(self) -> tuple[str, int]:
        """The id of this node in Ray, and of this process."""
        return place_of_this()

    async def start(self) -> str:
        """Starts the reward processes. Returns "" or why they cannot load the plug-in."""
        try:
            await self._pool.start()
        except PluginError as error:
            return str(error)
        return ""

    async def submit(self, scorings: bytes) -> None:
        """Begins to score under the caller's keys. scorings: of `pack_scorings`."""
        for scoring in unpack_scorings(scorings):
            try:
                scores = asyncio.gather(*self._pool.begin_encoded(scoring.encoded()))
            except Exception as error:  # raised where the scores are waited for
                self._finish(Done(scoring.key, [], describe(error)))
            else:
                scores.add_done_callback(lambda scores, key=scoring.key: self._finish(Done(key, list(scores.result()))))

    async def collect(self, wait_s: float) -> tuple[bytes, Health]:
        """What was done since the last call, waiting up to `wait_s` for the first: as `pack_done` gives it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._event.wait()
        self._event.clear()
        done, self._done = self._done, []
        return pack_done(done), await self.ping()

    def _finish(self, done: Done) -> None:
        self._done.append(done)
        self._event.set()

    async def ping(self) -> Health:
        """Answers as long as the actor lives."""
        return Health(tuple(self._pool.pids), self._pool.stats)

    async def close(self) -> None:
        """Ends the reward processes."""
        await self._pool.close()
