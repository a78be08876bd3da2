"""A stage's view of its engines: lease them, sample from them, give them back."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from posttrain.config.shared import ActorResources, EngineConfig, ServedModelConfig
from posttrain.context import StageContext
from posttrain.errors import MissingDependencyError, StageError
from posttrain.sampling.registry import start_registry
from posttrain.sampling.requests import Completion, SampleRequest

CHUNK_REQUESTS = 64
START_S = 900.0
STARTS = 3  # of engines in the place of one, before it is given up
LOOK_S = 1.0


class Engines:
    """A context manager over the leased engine actors. Must run inside an initialised Ray session."""

    def __init__(
        self, context: StageContext, model: ServedModelConfig, engine: EngineConfig, resources: ActorResources
    ):
        self._context = context
        self._model = model
        self._engine = engine
        self._resources = resources
        self._registry: Any = None
        self.names: list[str] = []
        self.actors: list[Any] = []

    def __enter__(self) -> "Engines":
        import ray

        require_vllm()
        self._registry = start_registry()
        served = self._model.model_dump(include=set(ServedModelConfig.model_fields))
        leased = ray.get(
            self._registry.acquire.remote(
                self._context.name, served, self._engine.model_dump(), self._resources.model_dump()
            )
        )
        self.names = [name for name, _, _ in leased]
        self.actors = [actor for _, actor, _ in leased]
        source = {"folder": self._model.path}
        try:
            ray.get(
                [
                    actor.start.remote() if is_new else actor.update_weights.remote(source, 0)
                    for _, actor, is_new in leased
                ]
            )
        except BaseException:
            self._give_back(keep=False)
            raise
        self._context.event("engines", names=self.names, warm=sum(not is_new for _, _, is_new in leased))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back(keep=kind is None and self._context.warm_engines)

    def _give_back(self, keep: bool) -> None:
        import ray

        ray.get(self._registry.release.remote(self.names, keep))

    async def replace(self, index: int, cause: BaseException) -> tuple[str, Any]:
        """Another engine in the place of one that was lost: its name and actor, started with the model's own weights.

        One that is lost before it has started is replaced too; StageError where that happens STARTS times in a row.
        """
        for left in reversed(range(STARTS)):
            lost = self.names[index]
            self._context.event("engine_replaced", name=lost, reason=reason_of(cause))
            self.names[index], self.actors[index] = await self._registry.replace.remote(lost)
            started = f"{self.names[index]}, in the place of {lost}, did not start"
            try:
                await answer(self.actors[index].start.remote(), START_S, started)
                break
            except Exception as error:
                if not left:
                    raise StageError(f"{started}: {reason_of(error)}") from error
                cause = error
        return self.names[index], self.actors[index]

    def generate(
        self, requests: Sequence[SampleRequest], on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        """Sample every request on all engines; `on_done` hears how many requests are finished."""
        return asyncio.run(self.generate_async(requests, on_done))

    async def generate_async(
        self, requests: Sequence[SampleRequest], on_done: Callable[[int], None] | None
    ) -> list[list[Completion]]:
        """`generate` for a caller with an event loop."""
        results: list[list[Completion]] = [[] for _ in requests]
        starts = iter(range(0, len(requests), CHUNK_REQUESTS))
        finished = 0

        async def drain(actor: Any, name: str) -> None:
            nonlocal finished
            for start in starts:
                chunk = requests[start : start + CHUNK_REQUESTS]
                completions, began, ended = await actor.generate.remote(chunk)
                results[start : start + len(chunk)] = completions
                finished += len(chunk)
                self._context.busy(name, "generate", began, ended)
                if on_done is not None:
                    on_done(finished)

        # Several chunks in flight an engine, so that it never waits for the next one.
        lanes = max(1, self._engine.max_num_seqs // CHUNK_REQUESTS) + 1
        await asyncio.gather(
            *(drain(actor, name) for _ in range(lanes) for actor, name in zip(self.actors, self.names, strict=True))
        )
        return results


def reason_of(error: BaseException) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


async def answer(call: Any, timeout_s: float, otherwise: str) -> Any:
    """The result of a remote call; TimeoutError, which says `otherwise` and how long it was, if it takes too long.

    Looks once more when time is up: where this process itself was stopped meanwhile, the answer is there.
    """
    waiting = asyncio.ensure_future(wait_for_call(call))
    try:
        if not (await asyncio.wait({waiting}, timeout=timeout_s))[0]:
            raise TimeoutError(f"{otherwise} within {timeout_s:g} s")
        return waiting.result()
    finally:
        waiting.cancel()


async def attended(actor: Any, call: Any, deadline_s: float, name: str) -> Any:
    """The result of a call that may take long, of an engine actor that must answer other calls meanwhile.

    name: what a TimeoutError says did not answer.
    """
    waiting = asyncio.ensure_future(wait_for_call(call))
    try:
        while not (await asyncio.wait({waiting}, timeout=LOOK_S))[0]:
            await answer(actor.pids.remote(), 3 * deadline_s, f"{name} did not answer")
        return waiting.result()
    finally:
        waiting.cancel()


async def wait_for_call(call: Any) -> Any:
    """The result of a remote call, as a coroutine."""
    return await call


def require_vllm() -> None:
    """Raise a clear error where vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed, and this stage samples with it: pip install 'posttrain[cpu]' (or [gpu])"
        )
