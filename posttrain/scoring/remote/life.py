"""One life of the reward actor: from its start until it is closed, dies, or no longer answers.

A heartbeat every second tells a frozen actor from a busy one: what an actor does on its loop takes milliseconds. An
actor that is lost is killed with all its processes, and every call that waits for it ends with ActorLostError.
"""

import asyncio
import contextlib
import os
import pickle
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from posttrain.config.shared import RewardResources
from posttrain.errors import PluginError, StageError
from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.pool.process import kill_marked
from posttrain.scoring.remote.actor import MARK, Done, Health, RewardActor, Scoring

PING_S = 1.0
COLLECT_S = 1.0
PLACE_S = 180.0
CLOSE_S = 10.0


class ActorLostError(Exception):
    """The actor died or was given up. What was sent to it may be sent to another."""


class ActorLife:
    """An actor from its start on. Must be used inside an initialised Ray session and a running event loop.

    deadline_s: an actor that does not answer a heartbeat for so long is lost.
    """

    def __init__(
        self, spec: RewardSpec, num_workers: int, timeout_s: float, resources: RewardResources, deadline_s: float
    ):
        import ray

        self._resources = resources
        self._deadline_s = deadline_s
        self._mark = uuid.uuid4().hex
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 10_000}
        self._actor: Any = (
            ray.remote(RewardActor).options(**options).remote(spec, num_workers, timeout_s, self._mark, os.getcwd())
        )
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process: psutil.Process | None = None
        self._serving: list[asyncio.Task[None]] = []
        self._outbox: list[Scoring] = []
        self._wake = asyncio.Event()
        self._scoring: dict[int, asyncio.Future[list[Scored]]] = {}
        self._num_scorings = 0
        self.health = Health()

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    @property
    def reason(self) -> str:
        """Why it is lost."""
        return self._lost.result()

    @property
    def pids(self) -> list[int]:
        """The actor's process, if it is on this node, and the reward processes as of the last answer."""
        return [*([self._process.pid] if self._process is not None else []), *self.health.pids]

    async def start(self) -> None:
        """Waits until the pool is ready. Raises PluginError where it cannot load the reward, StageError where the
        cluster has no place for the actor, ActorLostError."""
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
        self._serving = [asyncio.create_task(work()) for work in (self._watch, self._feed, self._empty)]
        reason = await self._call("start")
        if reason:
            raise PluginError(reason)
        self.health = await self._call("ping")

    async def score(self, pairs: Sequence[tuple[Rollout, Row]]) -> list[Scored]:
        """The scores in order. Raises ActorLostError."""
        if self.is_lost:
            raise ActorLostError(self.reason)
        self._num_scorings += 1
        key = self._num_scorings
        done = self._scoring[key] = asyncio.get_running_loop().create_future()
        self._outbox.append((key, pairs))
        self._wake.set()
        try:
            return await done
        finally:
            del self._scoring[key]

    async def close(self) -> None:
        """Ends the pool, then the actor; what still waits for a score gets none."""
        if not self.is_lost:
            closing = asyncio.ensure_future(self._call("close"))
            ended, _ = await asyncio.wait({closing}, timeout=CLOSE_S)
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            self._lose("it was closed", is_empty=bool(ended))
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        if not self.is_lost:
            answer = asyncio.ensure_future(_wait_for(getattr(self._actor, method).remote(*arguments)))
            try:
                await asyncio.wait({answer, self._lost}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    return answer.result()
            except RayTaskError:  # a defect of the actor's own code
                raise
            except RayError as error:
                self._lose(f"it died: {str(error).partition(chr(10))[0]}")
            finally:
                answer.cancel()
        raise ActorLostError(self.reason)

    async def _feed(self) -> None:
        """Send what waits; what comes while a call is on its way goes with the next."""
        while not self.is_lost:
            await self._wake.wait()
            self._wake.clear()
            scorings, self._outbox = self._outbox, []
            try:
                await self._call("submit", pickle.dumps(scorings))  # Ray's pickler asks Python about each record
            except Exception as error:
                self._resolve((key, error) for key, _ in scorings)

    async def _empty(self) -> None:
        while not self.is_lost:
            try:
                answered, self.health = await self._call("collect", COLLECT_S)
                done: list[Done] = pickle.loads(answered)
            except Exception as error:
                done = [(key, error) for key in self._scoring]
            self._resolve(done)

    def _resolve(self, done: Iterable[Done]) -> None:
        for key, scores in done:
            waiting = self._scoring.get(key)
            if waiting is None or waiting.done():  # its caller gave up
                continue
            if isinstance(scores, Exception):
                waiting.set_exception(scores)
            else:
                waiting.set_result(scores)

    async def _watch(self) -> None:
        while not self.is_lost:
            await asyncio.sleep(PING_S)
            ping = asyncio.ensure_future(self._call("ping"))
            # Not a timeout around it: where this process itself was stopped, the answer is there when time is up.
            if not (await asyncio.wait({ping}, timeout=self._deadline_s))[0]:
                self._lose(f"it did not answer for {self._deadline_s:g} s")
            with contextlib.suppress(ActorLostError):
                self.health = await ping

    def _lose(self, reason: str, is_empty: bool = False) -> None:
        """Nothing of the actor is left alive: a frozen one is deaf to Ray, and does not end its own processes.

        is_empty: it has ended them, and Ray is enough for what is left.
        """
        import ray

        if self.is_lost:
            return
        self._lost.set_result(reason)
        self._resolve((key, ActorLostError(reason)) for key in self._scoring)
        if self._process is not None and not is_empty:
            with contextlib.suppress(psutil.Error):
                self._process.kill()  # of this very process: psutil knows a number that was given to another
            kill_marked(MARK, self._mark)
        ray.kill(self._actor)


async def _wait_for(reference: Any) -> Any:
    return await reference
