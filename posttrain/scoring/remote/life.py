"""One life of the reward actor: from its start until it is closed, dies, or no longer answers.

Scorings go to the actor and scores come back over a lane (actors/lane.py). The calls of the lane are also the
heartbeat: the actor answers each within milliseconds, so an actor that is late is frozen. An actor that is lost is
killed with all its processes, and every call that waits for it ends with ActorLostError.
"""

import asyncio
import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil

from posttrain.actors.lane import COLLECT_S, Lane
from posttrain.actors.losses import ActorLostError, is_loss
from posttrain.actors.processes import kill_marked
from posttrain.config.resources import RewardResources
from posttrain.errors import PluginError, StageError
from posttrain.hosts.placement import pinned_here
from posttrain.records import Scored
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.remote.actor import MARK, Health, RewardActor
from posttrain.scoring.remote.messages import Pair, pack_scorings, unpack_done

PLACE_S = 180.0
CLOSE_S = 10.0


class Awaited:
    """The scores of the groups that one caller waits for."""

    def __init__(self) -> None:
        self._found: list[tuple[int, list[Scored]]] = []
        self._error: Exception | None = None
        self._has_some = asyncio.Event()

    def take(self, place: int, scores: list[Scored]) -> None:
        """Note the scores of the group at a place."""
        self._found.append((place, scores))
        self._has_some.set()

    def fail(self, error: Exception) -> None:
        """Note that there will be no more."""
        self._error = error
        self._has_some.set()

    async def some(self) -> list[tuple[int, list[Scored]]]:
        """The places and scores that have come since the last call; waits for the first. Raises the error of `fail`
        after all that came before it.
        """
        await self._has_some.wait()
        if not self._found and self._error is not None:
            raise self._error
        if self._error is None:
            self._has_some.clear()
        found, self._found = self._found, []
        return found


class ActorLife:
    """An actor from its start on. Must be used inside an initialised Ray session and a running event loop.

    deadline_s: an actor that does not answer for so many seconds counts as lost.
    """

    def __init__(
        self,
        spec: RewardSpec,
        num_processes: int,
        timeout_s: float,
        *,
        resources: RewardResources,
        deadline_s: float,
    ):
        import ray

        self._resources = resources
        self._mark = uuid.uuid4().hex
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 10_000}
        actor = ray.remote(RewardActor).options(**options, **pinned_here())
        self._actor: Any = actor.remote(spec, num_processes, timeout_s, mark=self._mark, folder=os.getcwd())
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process: psutil.Process | None = None
        self._serving: asyncio.Task[None] | None = None
        self._lane: Lane[tuple[int, Sequence[Pair]], tuple[bytes, Health]] = Lane(
            lambda scorings: self._actor.submit.remote(pack_scorings(scorings)),
            lambda: self._actor.collect.remote(COLLECT_S),
            lambda collected: self._take(*collected),
            deadline_s=deadline_s,
            name=lambda: "it",
            refused=lambda scorings, error: self._fail((key for key, _ in scorings), error),
        )
        self._scoring: dict[int, tuple[Awaited, int]] = {}  # by key: who waits for it, and the place of the group
        self._next_key = 0
        self.health = Health()

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    @property
    def reason(self) -> str:
        """Why the actor counts as lost."""
        return self._lost.result()

    @property
    def pids(self) -> list[int]:
        """The process ids of the actor, if it is on this node, and of the reward processes, from the last answer."""
        return [*([self._process.pid] if self._process is not None else []), *self.health.pids]

    async def start(self) -> None:
        """Wait until the pool is ready. Raises PluginError if it cannot load the reward, StageError if the cluster has
        no place for the actor, and ActorLostError if the actor is lost."""
        import ray

        placed = asyncio.ensure_future(self._call("where"))
        if not (await asyncio.wait({placed}, timeout=PLACE_S))[0]:
            placed.cancel()
            self._lose("it found no place")
            asked = f"{self._resources.cpus:g} CPU and {self._resources.gpus:g} GPU"
            raise StageError(
                f"the reward actor found no place within {PLACE_S:g} s with {asked}; lower resources.reward"
            )
        node, pid = placed.result()
        if node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)
        self._serving = asyncio.create_task(self._serve())
        reason = await self._call("start")
        if reason:
            raise PluginError(reason)
        self.health = await self._call("ping")

    @contextlib.contextmanager
    def scoring(self, groups: Mapping[int, Sequence[Pair]]) -> Iterator[Awaited]:
        """Have the actor score groups of pairs, by their places, for as long as the `with` block waits for them.

        Raises ActorLostError if the actor is lost; `Awaited.some` does so if it is lost meanwhile.
        """
        if self.is_lost:
            raise ActorLostError(self.reason)
        awaited = Awaited()
        keys = range(self._next_key, self._next_key + len(groups))
        self._next_key = keys.stop
        for key, (place, pairs) in zip(keys, groups.items(), strict=True):
            self._scoring[key] = awaited, place
            self._lane.send((key, pairs))
        try:
            yield awaited
        finally:
            for key in keys:
                self._scoring.pop(key, None)

    async def close(self) -> None:
        """End the pool, then the actor. Rollouts that still wait for a score get none."""
        if not self.is_lost:
            closing = asyncio.ensure_future(self._call("close"))
            ended, _ = await asyncio.wait({closing}, timeout=CLOSE_S)
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            self._lose("it was closed", is_empty=bool(ended))
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        if not self.is_lost:
            answer = asyncio.ensure_future(getattr(self._actor, method).remote(*arguments))
            try:
                await asyncio.wait({answer, self._lost}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    return answer.result()
            except RayTaskError:  # a defect of the actor's own code
                raise
            except RayError as error:
                self._lose(_reason_of_loss(error))
            finally:
                answer.cancel()
        raise ActorLostError(self.reason)

    async def _serve(self) -> None:
        try:
            await self._lane.serve()
        except Exception as error:
            if not is_loss(error):  # a defect of the actor's own code, for whoever waits for its scores
                self._fail(list(self._scoring), error)
            self._lose(_reason_of_loss(error))

    def _take(self, answered: bytes, health: Health) -> None:
        self.health = health
        for done in unpack_done(answered):
            if done.error:
                self._fail([done.key], StageError(f"the reward actor could not score: {done.error}"))
            elif (waiting := self._scoring.pop(done.key, None)) is not None:  # None: the caller has given up
                awaited, place = waiting
                awaited.take(place, done.scores)

    def _fail(self, keys: Iterable[int], error: Exception) -> None:
        """Raise the error in the calls that wait for these scores."""
        for key in keys:
            if (waiting := self._scoring.pop(key, None)) is not None:
                waiting[0].fail(error)

    def _lose(self, reason: str, is_empty: bool = False) -> None:
        """Kill the actor and its processes. A frozen actor does not react to `ray.kill`, and cannot end its processes.

        is_empty: whether the actor has ended its processes already, so that `ray.kill` is enough.
        """
        import ray

        if self.is_lost:
            return
        self._lost.set_result(reason)
        self._fail(list(self._scoring), ActorLostError(reason))
        if self._process is not None and not is_empty:
            with contextlib.suppress(psutil.Error):
                self._process.kill()  # psutil refuses if the pid belongs to another process by now
            kill_marked(MARK, self._mark)
        ray.kill(self._actor)


def _reason_of_loss(error: Exception) -> str:
    if isinstance(error, TimeoutError):  # the lane's
        return str(error)
    return f"it died: {str(error).partition(chr(10))[0]}"
