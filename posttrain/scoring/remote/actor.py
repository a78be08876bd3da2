"""The reward pool as a Ray actor, so that scoring takes no time of the controller's process. Stages use `client.py`.

    client ── submit: any number of scorings ──► RewardActor ── one by one ──► RewardPool ──► reward processes
           ◄── collect: those that are done, and how the pool is ──

A scoring is any number of rollouts under one key. It is done when its own rollouts are. One call brings or fetches many
scorings, because a call between processes takes longer than a score.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from posttrain.actors.processes import place_of_this
from posttrain.errors import PluginError
from posttrain.records import Scored
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.target import describe
from posttrain.scoring.pool.pool import RewardPool
from posttrain.scoring.pool.stats import PoolStats
from posttrain.scoring.pool.wire import EncodedPair
from posttrain.scoring.remote.messages import Done, Scoring, pack_done, unpack_scorings

# An environment variable of the reward processes and of everything that they start. It names the actor they belong to.
MARK = "POSTTRAIN_REWARD_ACTOR"


GATHER_S = 0.01  # a call between processes costs more than many scores


@dataclass(frozen=True, slots=True)
class Health:
    """An actor's report about itself, which comes with every answer. pids: the ids of its reward processes."""

    pids: tuple[int, ...] = ()
    stats: PoolStats = field(default_factory=PoolStats)


class _BeingScored:
    """A scoring whose rollouts are being scored. finish: gets it when all have their scores."""

    __slots__ = ("_finish", "_num_left", "_scores", "_scoring")

    def __init__(self, scoring: Scoring, finish: Callable[[Done], None]):
        self._scoring = scoring
        self._finish = finish
        self._scores: list[Scored | None] = [None] * len(scoring.pairs)
        self._num_left = len(scoring.pairs)

    def places(self) -> Iterator[tuple[EncodedPair | str, "_Place"]]:
        """Each pair with the place for its score."""
        for index, pair in enumerate(self._scoring.encoded()):
            yield pair, _Place(self, index)

    def has(self, index: int) -> bool:
        """Whether a rollout has its score."""
        return self._scores[index] is not None

    def take(self, index: int, scored: Scored) -> None:
        """Take the score of a rollout."""
        self._scores[index] = scored
        self._num_left -= 1
        if not self._num_left:
            self._finish(Done(self._scoring.key, [scored for scored in self._scores if scored is not None]))


class _Place:
    """Gets the score of one rollout of a scoring."""

    __slots__ = ("_index", "_of")

    def __init__(self, of: _BeingScored, index: int):
        self._of = of
        self._index = index

    def done(self) -> bool:
        return self._of.has(self._index)

    def set_result(self, result: Scored) -> None:
        self._of.take(self._index, result)


class RewardActor:
    """Holds a pool. mark: the value of MARK in its processes. folder: relative paths of plug-ins start here."""

    def __init__(self, spec: RewardSpec, num_processes: int, timeout_s: float, *, mark: str, folder: str):
        os.environ[MARK] = mark
        with contextlib.suppress(OSError):  # another node need not have it
            os.chdir(folder)
        self._pool = RewardPool(spec, num_processes, timeout_s)
        self._done: list[Done] = []
        self._event = asyncio.Event()
        self._num_open = 0  # scorings that are not done

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
            self._num_open += 1
            being_scored = _BeingScored(scoring, self._finish)
            try:
                self._pool.begin_encoded(being_scored.places())
            except Exception as error:  # raised where the scores are waited for
                self._finish(Done(scoring.key, [], describe(error)))

    async def collect(self, wait_s: float) -> tuple[bytes, Health]:
        """Wait up to `wait_s` for a scoring to be done, and then a moment for others. Returns all that are done since
        the last call, as `pack_done` encodes them.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._event.wait()
                if self._num_open:
                    await asyncio.sleep(GATHER_S)
        self._event.clear()
        done, self._done = self._done, []
        return pack_done(done), await self.ping()

    def _finish(self, done: Done) -> None:
        self._num_open -= 1
        self._done.append(done)
        self._event.set()

    async def ping(self) -> Health:
        """Return at once. An actor that does not answer this call is frozen or dead."""
        return Health(tuple(self._pool.pids), self._pool.stats)

    async def close(self) -> None:
        """End the reward processes."""
        await self._pool.close()
