"""One life of the reward actor: from its start until it is closed, dies, or no longer answers.

Scorings go to the actor and scores come back over a lane (actors/lane.py). The calls of the lane are also the
heartbeat: the actor answers each within milliseconds, so an actor that is late is frozen. An actor that is lost is
killed with all its processes, and every call that waits for it ends with ActorLostError.
"""

import asyncio
import contextlib
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from posttrain.actors.lane import COLLECT_S, Lane
from posttrain.actors.losses import ActorLostError, is_loss
from posttrain.actors.processes import kill_marked
from posttrain.config.resources import RewardResources
from posttrain.errors import PluginError, StageError
from posttrain.hosts.placement import pinned_here
from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.remote.actor import MARK, Health, RewardActor
from posttrain.scoring.remote.messages import Scoring, pack_scorings, scoring_of, unpack_done

PLACE_S = 180.0
CLOSE_S = 10.0


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
        self._lane: Lane[Scoring, tuple[bytes, Health]] = Lane(
            lambda scorings: self._actor.submit.remote(pack_scorings(scorings)),
            lambda: self._actor.collect.remote(COLLECT_S),
            lambda collected: self._take(*collected),
            deadline_s=deadline_s,
            name=lambda: "it",
            refused=lambda scorings, error: self._fail((scoring.key for scoring in scorings), error),
        )
        self._scoring: dict[int, asyncio.Future[list[Scored]]] = {}
        self._num_scorings = 0
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

    async def score(self, pairs: Sequence[tuple[Rollout, Row]]) -> list[Scored]:
        """The scores of the pairs, in order. Raises ActorLostError if the actor is lost meanwhile."""
        if self.is_lost:
            raise ActorLostError(self.reason)
        self._num_scorings += 1
        key = self._num_scorings
        done = self._scoring[key] = asyncio.get_running_loop().create_future()
        self._lane.send(scoring_of(key, pairs))
        try:
            return await done
        finally:
            del self._scoring[key]

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
            elif (waiting := self._waiting(done.key)) is not None:
                waiting.set_result(done.scores)

    def _fail(self, keys: Iterable[int], error: Exception) -> None:
        """Raise the error in the calls that wait for these scores."""
        for key in keys:
            if (waiting := self._waiting(key)) is not None:
                waiting.set_exception(error)

    def _waiting(self, key: int) -> asyncio.Future[list[Scored]] | None:
        """The future that the caller of a scoring waits for; None if the caller has given up."""
        waiting = self._scoring.get(key)
        return None if waiting is None or waiting.done() else waiting

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
