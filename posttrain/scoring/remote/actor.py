"""The reward pool as a Ray actor, so that scoring takes no time of the controller's process. Stages use `client.py`.

    client ── submit: any number of scorings ──► RewardActor ── one by one ──► RewardPool ──► reward processes
           ◄── collect: those that are done, and how the pool is ──

A scoring is any number of rollouts under one key. It is done when its own rollouts are. One call brings or fetches many
scorings, because a call between processes takes longer than a score.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass, field

from posttrain.actors.processes import place_of_this
from posttrain.errors import PluginError
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.target import describe
from posttrain.scoring.pool.pool import RewardPool
from posttrain.scoring.pool.stats import PoolStats
from posttrain.scoring.remote.messages import Done, pack_done, unpack_scorings

# An environment variable of the reward processes and of everything that they start. It names the actor they belong to.
MARK = "POSTTRAIN_REWARD_ACTOR"


@dataclass(frozen=True, slots=True)
class Health:
    """An actor's report about itself, which comes with every answer. pids: the ids of its reward processes."""

    pids: tuple[int, ...] = ()
    stats: PoolStats = field(default_factory=PoolStats)


class RewardActor:
    """Holds a pool. mark: the value of MARK in its processes. folder: relative paths of plug-ins start here."""

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
        """Start the reward processes. Returns "", or the reason if they cannot load the plug-in."""
        try:
            await self._pool.start()
        except PluginError as error:
            return str(error)
        return ""

    async def submit(self, scorings: bytes) -> None:
        """Begin to score under the caller's keys. scorings: bytes from `pack_scorings`."""
        for scoring in unpack_scorings(scorings):
            try:
                scores = asyncio.gather(*self._pool.begin_encoded(scoring.encoded()))
            except Exception as error:  # raised where the scores are waited for
                self._finish(Done(scoring.key, [], describe(error)))
            else:
                scores.add_done_callback(lambda scores, key=scoring.key: self._finish(Done(key, list(scores.result()))))

    async def collect(self, wait_s: float) -> tuple[bytes, Health]:
        """Wait up to `wait_s` for a scoring to be done. Returns all that are done since the last call, as `pack_done`
        encodes them.
        """
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
        """Return at once. An actor that does not answer this call is frozen or dead."""
        return Health(tuple(self._pool.pids), self._pool.stats)

    async def close(self) -> None:
        """End the reward processes."""
        await self._pool.close()
