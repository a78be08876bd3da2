"""vLLM's engine core as an engine uses it: started, watched, asked with a deadline, given new weights, shut down.

```
start ──────────► vLLM's AsyncLLM ──► core process ◄── watch: is it dead or frozen?
ask ────────────► an answer within `deadline_s`, or EngineLostError
update_weights ─► verify checksums, build beside generation, pause between two steps, exchange, resume
```

Left out: requests and replies, which are in engine.py.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, TypeVar

from posttrain.actors.garbage import large_imports
from posttrain.actors.parent import die_with_parent
from posttrain.actors.shared_memory import shared_memory
from posttrain.compat import vllm as compat
from posttrain.compat.vllm_images import forget_weights
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.sampling.arguments import cpu_cache_arguments, cpu_environment, engine_arguments
from posttrain.sampling.manifests import WeightManifest, WeightSource, to_plain
from posttrain.sampling.progress import BUILT, FAILED, Progress
from posttrain.sampling.requests import EngineLostError, Updated
from posttrain.sampling.step_sums import PATH, StepSums
from posttrain.sampling.watch import Watch, look_every_s

T = TypeVar("T")
BUILT_LOOK_S = 0.005


class Core:
    """The engine core of the engine `name`, and vLLM's `AsyncLLM` by which it is reached.

    Every wait ends with EngineLostError when the core has died or does not answer within `deadline_s`. The error names
    the engine and its policy version.

    has_work: whether requests are in the engine, so that a silent core may be a frozen one. on_lost: called once, when
    the core is found to be lost.
    """

    def __init__(
        self,
        name: str,
        model: ServedModelConfig,
        engine: EngineConfig,
        *,
        has_work: Callable[[], bool],
        on_lost: Callable[[], None],
    ):
        self.llm: Any = None  # an `AsyncLLM` once the core is started
        self._name = name
        self._model = model
        self._engine = engine
        self.update_phases: dict[str, float] = {}
        self._policy_version = 0
        self._is_updating = False
        self._progress: Progress
        self._steps: StepSums
        self._watching: asyncio.Task[None] | None = None
        self._watch = Watch(
            engine.deadline_s,
            is_dead=lambda: self.llm.errored,
            is_busy=lambda: not self._is_updating and has_work(),
            ping=lambda: self.llm.get_weight_version(),
            say=lambda message: f"engine {name}, policy version {self._policy_version}: {message}",
            on_lost=on_lost,
        )

    # ------------------------------------------------------------------ start and shutdown

    async def start(self, folder: str) -> list[int]:
        """Start the core on the model in a folder of this host; returns the process ids of its vLLM workers."""
        on_cpu = not os.environ.get("CUDA_VISIBLE_DEVICES")
        if on_cpu:
            os.environ.update(cpu_environment(self._engine))
        with large_imports():
            from vllm import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            from posttrain.sampling import vllm_extension  # noqa: F401  (registers the backend before the fork)

        model = self._model.model_copy(update={"path": folder})
        arguments = engine_arguments(model, self._engine)
        if on_cpu:
            arguments |= cpu_cache_arguments(model, self._engine)
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
        kind = "AsyncScheduler" if config.scheduler_config.async_scheduling else "Scheduler"
        config.scheduler_config.scheduler_cls = f"posttrain.sampling.vllm_scheduler.{kind}"
        is_forked = config.device_config.device_type == "cpu"
        die = partial(die_with_parent, os.getpid())
        self._steps = StepSums.create()
        os.environ[PATH] = self._steps.path
        with compat.forked_core(die) if is_forked else contextlib.nullcontext():
            self.llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        self._steps.give_up()
        self._watch.heard()
        self._watching = asyncio.create_task(self._watch.run())
        self._progress = Progress.create()
        workers = await self.ask("start", self.llm.collective_rpc("die_with_parent"))
        await self.ask("start", self.llm.collective_rpc("note_progress", args=(self._progress.path,)))
        self._progress.give_up()
        await self.ask("start", self.llm.collective_rpc("draw_by_place"))
        await self.ask("start", self.llm.update_weight_version("0"))
        await self.ask("start", self.llm.get_supported_tasks())
        if self._engine.tensor_parallel > 1:  # its parts have opened what they share, and may be killed at any time
            for path in shared_memory([os.getpid(), compat.core_pid(self.llm), *workers]):
                path.unlink(missing_ok=True)
        return workers

    def shutdown(self) -> None:
        """Stop the core, if it was started."""
        if self._watching is not None:
            self._watching.cancel()
        if self.llm is not None:
            self.llm.shutdown()

    # ------------------------------------------------------------------ asked with a deadline

    @property
    def is_lost(self) -> bool:
        """Whether the core is known to be lost."""
        return self._watch.error is not None

    def check(self) -> None:
        """Raise EngineLostError if the core is lost."""
        self._watch.check()

    def hear(self, output: Any) -> None:
        """Note an output of vLLM as a sign of life, or its error as the death of the core."""
        if isinstance(output, Exception):
            self._watch.lose(f"its core process has died ({type(output).__name__}: {output})")
        else:
            self._watch.heard()

    def died(self) -> EngineLostError:
        """The error to raise where vLLM says that the core has died."""
        return self._watch.lose("its core process has died")

    async def alive(self, awaitable: Awaitable[T]) -> T:
        """The result, or EngineLostError as soon as the core is known to be lost."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._watch.guard(awaitable)
        except EngineDeadError:
            raise self.died() from None

    async def ask(self, what: str, awaitable: Awaitable[T]) -> T:
        """The core's answer. Raises EngineLostError if it does not come within `deadline_s`."""
        deadline_s = self._engine.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self.alive(awaitable)
        except TimeoutError:
            raise self._watch.lose(f"{what}: no answer in {deadline_s:g} s") from None

    # ------------------------------------------------------------------ weights

    async def update_weights(
        self, source: WeightSource, policy_version: int, kv: Literal["recompute", "keep"], *, prefixes: bool
    ) -> Updated:
        """Take new weights between two steps. See `EngineActor.update_weights`. prefixes: see `forget_weights`.

        Afterwards `update_phases` has the seconds of each phase, in order.
        """
        what = f"the update to policy version {policy_version}"
        plain = to_plain(source)
        phases = _Phases()
        if isinstance(source, WeightManifest):  # while the core still samples
            from posttrain.sampling.weights import verify  # with torch, which the process of a stage does without

            await self._follow(asyncio.to_thread(verify, source, self._progress.note), what)
        phases.end("verify")
        built = all(await self.ask(what, self.llm.collective_rpc("build_weights", args=(plain,))))
        if built:
            await self._follow(self._built(), what)
        phases.end("build")
        began = time.time()
        self._is_updating = True
        try:
            await self.ask(what, compat.pause_between_steps(self.llm))
            phases.end("stop")
            if built:
                await self.ask(what, self.llm.collective_rpc("exchange_weights"))
            else:
                await self._follow(self.llm.collective_rpc("apply_weights", args=(plain,)), what)
            phases.end("exchange" if built else "load")
            await self.ask(what, forget_weights(self.llm, running=kv == "recompute", prefixes=prefixes))
            await self.ask(what, self.llm.update_weight_version(str(policy_version)))
            self._policy_version = policy_version
            phases.end("forget")
            sums = self._steps.taken()
            await self.ask(what, self.llm.resume_generation())
            phases.end("resume")
        finally:
            self._is_updating = False
            self._watch.heard()
        self.update_phases = phases.seconds
        return Updated(began, time.time(), sums)

    async def _built(self) -> None:
        """Wait until the worker has built the weights."""
        while (note := self._progress.read()[1]) != BUILT:
            if note.endswith(FAILED):
                await self.llm.collective_rpc("exchange_weights")  # raises what the building raised
            await asyncio.sleep(BUILT_LOOK_S)

    async def _follow(self, work: Awaitable[Any], update: str) -> None:
        """Wait for a part of an update, as long as it makes progress from tensor to tensor."""
        deadline_s = self._engine.deadline_s
        task = asyncio.ensure_future(self.alive(work))
        seen, since = self._progress.read(), time.monotonic()
        while True:
            await asyncio.wait({task}, timeout=look_every_s(deadline_s))
            now = self._progress.read()
            if now != seen:
                seen, since = now, time.monotonic()
            what = f"{update}, at {now[1] or 'its start'}"
            if task.done():
                error = task.exception()
                if error is None or self.is_lost:
                    return task.result()
                raise self._watch.lose(f"{what}, failed: {error}")
            if time.monotonic() - since > deadline_s:
                task.cancel()
                raise self._watch.lose(f"{what}, stood still for {deadline_s:g} s")


class _Phases:
    """How long each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now
