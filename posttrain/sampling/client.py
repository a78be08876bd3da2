"""A stage's view of its engines: lease them, sample from them, give them back.

sample(requests) ─► chunks ─► the engine with the least to do ─► completions, in the order of the requests
                       ▲                │ killed, frozen, no answer to the heartbeat
                       └────────────────┘ the chunk goes to another engine, and one is started in the lost one's place
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from posttrain.actors.calls import await_call, await_with_heartbeat
from posttrain.actors.losses import MAX_CONSECUTIVE_LOSSES, is_loss, reason_of
from posttrain.config.shared import ActorResources, EngineConfig, ServedModelConfig
from posttrain.context import BusyLog, StageContext
from posttrain.errors import MissingDependencyError, StageError
from posttrain.model.folder import check_folder
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.registry import start_registry
from posttrain.sampling.requests import Completion, EngineLostError, SampleRequest

CHUNK_REQUESTS = 64
START_S = 900.0
MAX_STARTS = 3  # how many engines may fail to start in the place of a lost one before the stage fails

Sampled = tuple[list[list[Completion]], float, float]  # completions by request; Unix times of start and end


class Engines:
    """The engines that a stage has leased, as a context manager. It needs an initialised Ray session.

    activity: the word for what the engines do, for the timeline. logs: when each engine was busy, by the name of the
    first engine in each place; an engine that replaces it continues its log.

    Example: `with Engines(context, config.model, config.engine, resources=actor_resources) as engines: ...`.
    """

    def __init__(
        self,
        context: StageContext,
        model: ServedModelConfig,
        engine: EngineConfig,
        *,
        resources: ActorResources,
        activity: str = "generate",
    ):
        self._context = context
        self._model = model
        self._engine = engine
        self._resources = resources
        self._activity = activity
        self._registry: Any = None
        self._unstarted: set[str] = set()  # engines that are leased and not ready
        self._num_chunks: list[int] = []  # in flight, by engine
        self._num_calls = 0  # of `sample`, in progress
        self._replacing: dict[int, asyncio.Task[None]] = {}
        self.logs: dict[str, BusyLog] = {}
        self.names: list[str] = []
        self.actors: list[Any] = []

    def __enter__(self) -> "Engines":
        import ray

        require_vllm()
        check_folder(self._model.path)
        self._registry = start_registry()
        served = self._model.model_dump(include=set(ServedModelConfig.model_fields))
        leased = ray.get(
            self._registry.acquire.remote(
                self._context.name, served, self._engine.model_dump(), resources=self._resources.model_dump()
            )
        )
        self.names = [name for name, _, _ in leased]
        self.actors = [actor for _, actor, _ in leased]
        self.logs = {name: BusyLog(self._context, name, self._activity) for name in self.names}
        self._num_chunks = [0] * len(leased)
        self._unstarted = set(self.names)
        try:
            asyncio.run(_all(self._prepare(index, is_new) for index, (_, _, is_new) in enumerate(leased)))
        except BaseException:
            self._give_back(keep=False)
            raise
        self._context.event("engines", names=self.names, warm=sum(not is_new for _, _, is_new in leased))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._give_back(keep=kind is None and self._context.warm_engines)

    def _give_back(self, keep: bool) -> None:
        """Release all engines. One that is still starting is never kept warm: a later stage could not use it."""
        import ray

        ready = [name for name in self.names if name not in self._unstarted]
        ray.get(
            [self._registry.release.remote(ready, keep), self._registry.release.remote(list(self._unstarted), False)]
        )

    # ------------------------------------------------------------------ start and replacement

    async def _prepare(self, index: int, is_new: bool) -> None:
        """Start a new engine, or load the model's weights into a warm one.

        An engine that is lost in that is replaced.
        """
        name, actor = self.names[index], self.actors[index]
        source = FolderWeights(self._model.path)
        try:
            if is_new:
                await actor.start.remote()
            else:
                await self._await_engine(actor, actor.update_weights.remote(source, 0), name)
        except Exception as error:
            if not is_loss(error):
                raise
            await self.replace(index, error)
        else:
            self._unstarted.remove(name)

    async def replace(self, index: int, cause: BaseException) -> tuple[str, Any]:
        """Replace an engine that was lost; returns the new one's name and actor, started with the model's own weights.

        An engine that is lost while it starts is replaced too. Raises StageError when that happens MAX_STARTS times in
        a row.
        """
        for num_left in reversed(range(MAX_STARTS)):
            lost = self.names[index]
            self._context.event("engine_replaced", name=lost, reason=reason_of(cause))
            self._unstarted.add(lost)
            name, actor = self.names[index], self.actors[index] = await self._registry.replace.remote(lost)
            self._unstarted.remove(lost)
            self._unstarted.add(name)
            started = f"{name}, in the place of {lost}, did not start"
            try:
                await await_call(actor.start.remote(), START_S, started)
                self._unstarted.remove(name)
                break
            except Exception as error:
                if not num_left:
                    raise StageError(f"{started}: {reason_of(error)}") from error
                cause = error
        return self.names[index], self.actors[index]

    def _begin_replacing(self, index: int, lost: Any, cause: BaseException) -> None:
        """Begin to replace an engine in the background, unless another call that lost the same engine has already
        begun.
        """
        if index in self._replacing or self.actors[index] is not lost:
            return

        async def replace() -> None:
            try:
                await self.replace(index, cause)
            except asyncio.CancelledError:
                del self._replacing[index]
                raise
            del self._replacing[index]  # a failure stays, so that whoever waits for this engine hears of it

        self._replacing[index] = asyncio.ensure_future(replace())

    # ------------------------------------------------------------------ sampling

    def generate(
        self, requests: Sequence[SampleRequest], on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        """`sample` for a caller without an event loop."""
        return asyncio.run(self.sample(requests, on_done))

    async def sample(
        self, requests: Sequence[SampleRequest], on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        """Sample every request on all engines; returns the completions in the order of the requests.

        on_done: called with the number of finished requests. Any number of calls may run at the same time. An engine
        that is lost is replaced, and its unfinished requests are sampled again. Raises EngineLostError for requests
        that were lost with MAX_CONSECUTIVE_LOSSES engines in a row, and StageError if no engine can be started.
        """
        results: list[list[Completion]] = [[] for _ in requests]
        starts = iter(range(0, len(requests), CHUNK_REQUESTS))
        num_finished = 0

        async def drain() -> None:
            nonlocal num_finished
            for start in starts:
                chunk = requests[start : start + CHUNK_REQUESTS]
                results[start : start + len(chunk)] = await self._sample_chunk(chunk)
                num_finished += len(chunk)
                if on_done is not None:
                    on_done(num_finished)

        with self._call():
            # Each engine has several chunks in flight, so that it never waits for the next one.
            num_seats = (max(1, self._engine.max_num_seqs // CHUNK_REQUESTS) + 1) * len(self.actors)
            num_chunks = -(-len(requests) // CHUNK_REQUESTS)
            await _all(drain() for _ in range(min(num_seats, num_chunks)))
            await self._settle()
        return results

    async def _sample_chunk(self, chunk: Sequence[SampleRequest]) -> list[list[Completion]]:
        return await self._attempt(lambda actor: actor.generate.remote(chunk), self._least_busy)

    async def _attempt(
        self, call: Callable[[Any], Awaitable[Sampled]], choose: Callable[[], int]
    ) -> list[list[Completion]]:
        """What one call of an engine returns; when the engine is lost, the call is made again to another one."""
        num_losses = 0
        while True:
            index = choose()
            if (replacement := self._replacing.get(index)) is not None:
                await asyncio.shield(replacement)
            name, actor = self.names[index], self.actors[index]
            self._num_chunks[index] += 1
            try:
                completions, began, ended = await self._await_engine(actor, call(actor), name)
            except Exception as error:
                if not is_loss(error):
                    raise
                num_losses += 1
                if num_losses == MAX_CONSECUTIVE_LOSSES:
                    raise EngineLostError(
                        f"{num_losses} engines were lost in a row at the same requests; the last: {reason_of(error)}"
                    ) from error
                self._begin_replacing(index, actor, error)
            else:
                list(self.logs.values())[index].add(began, ended)
                return completions
            finally:
                self._num_chunks[index] -= 1

    def _least_busy(self) -> int:
        """The engine with the fewest chunks in flight, of those that are not being replaced if there is one."""
        able = [index for index in range(len(self.actors)) if index not in self._replacing]
        return min(able or self._replacing, key=self._num_chunks.__getitem__)

    async def _await_engine(self, actor: Any, call: Awaitable[Any], name: str) -> Any:
        """The result of a call that may take long; TimeoutError if the actor does not answer a heartbeat meanwhile."""
        return await await_with_heartbeat(call, actor.pids.remote, 3 * self._engine.deadline_s, name=name)

    @contextmanager
    def _call(self) -> Iterator[None]:
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._flush()

    async def _settle(self) -> None:
        """Wait until no engine is being replaced, so that the next caller finds all of them ready."""
        while self._replacing:
            await asyncio.shield(next(iter(self._replacing.values())))

    def _flush(self) -> None:
        """Write the busy events that are still held back."""
        for log in self.logs.values():
            log.flush()


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
            "vLLM is not installed, and this stage samples with it: pip install 'posttrain[cpu]' (or [gpu])"
        )
