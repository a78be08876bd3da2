"""One vLLM engine in a Ray actor: samples, takes new weights in flight, and reports which weights sampled each token.

```
submit ──► vLLM: core process ──► output handler ──► Reply.put ──► outbox ──► collect     pieces, while they grow
generate ─►        ▲                     └─────────► queue ─────► completions             whole replies
update_weights ────┘ pause between two steps, swap, resume              watch: is the core dead or frozen?
```

What waits for what: `generate` waits for its own replies, `collect` for the first piece of any; `update_weights` pauses
the scheduler between two steps, so running requests continue under the new version; `generate_wave` has the engine to
itself. Each wait ends with EngineLostError when the core has died or does not answer within `deadline_s`.
"""

import asyncio
import contextlib
import json
import os
import time
import traceback
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from posttrain.actors.garbage import large_imports
from posttrain.actors.parent import die_with_parent
from posttrain.actors.processes import place_of_this
from posttrain.compat import vllm as compat
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import StageError
from posttrain.model.length import engine_length
from posttrain.records import FinishReason, VersionSpan
from posttrain.sampling.kv_memory import cpu_kv_cache_bytes
from posttrain.sampling.manifests import WeightSource, to_plain
from posttrain.sampling.progress import Progress
from posttrain.sampling.requests import Completion, EngineLostError, Piece, SampleRequest
from posttrain.sampling.start_failure import PrintedSince, start_error
from posttrain.sampling.stream import Outbox, Reply, finish_reason_of
from posttrain.sampling.watch import Watch, look_every_s

T = TypeVar("T")
WAKE_S = 0.01
ADMIT_AT_ONCE = 64

# vLLM reads these when it is imported. One OpenMP thread a process: two in contention cost a factor of ten.
ENGINE_ENV = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def engine_arguments(model: ServedModelConfig, engine: EngineConfig) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs for this model and configuration."""
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": engine_length(engine, model.path),
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel,
        "gpu_memory_utilization": engine.gpu_memory_fraction,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.prefix_caching,
        "logprobs_mode": "processed_logprobs",  # of the very distribution that tokens are drawn from, as RL needs
        "worker_extension_cls": "posttrain.sampling.vllm_extension.WorkerExtension",
        "weight_transfer_config": {"backend": "shm"},
        "stream_interval": engine.stream_interval,
        "generation_config": "vllm",  # ignore the folder's generation_config.json: requests say how to sample
        "disable_log_stats": True,
        "seed": 0,
        "trust_remote_code": False,
    }
    if engine.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    return {**arguments, **compat.keep_attention_temperature(read_model_config(model.path))}


def read_model_config(path: str) -> dict[str, Any]:
    """The text part of a model folder's config.json."""
    config = json.loads((Path(path) / "config.json").read_text())
    return config.get("text_config", config)


class EngineActor:
    """A vLLM `AsyncLLM`. Made a Ray actor by the registry; every method is a coroutine of one event loop."""

    def __init__(self, name: str, model: dict[str, Any], engine: dict[str, Any]):
        os.environ.update(ENGINE_ENV)
        self._on_cpu = not os.environ.get("CUDA_VISIBLE_DEVICES")
        if self._on_cpu:
            # vLLM would have a C++ compiler make one small function, whatever `enforce_eager` says.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        self.name = name
        self._model = ServedModelConfig(**model)
        self._engine_config = EngineConfig(**engine)
        self._llm: Any = None
        self._tokenizer: Any = None
        self._next_request = 0
        self._policy_version = 0
        self._num_collecting = 0  # calls of collect
        self._is_wave = False
        self._is_updating = False
        self._update_lock: asyncio.Lock
        self._outbox: Outbox
        self._watch: Watch
        self._watching: asyncio.Task[None]
        self._progress: Progress

    async def where(self) -> tuple[str, int]:
        """The id of this actor's node in Ray, and its process id: what `kill_process` takes."""
        return place_of_this()

    async def start(self) -> dict[str, Any]:
        """Start the engine; returns its name, process ids and start-up seconds.

        Raises EngineLostError if the engine core was lost meanwhile, and EngineStartError for any other failure.
        """
        began, printed = time.time(), PrintedSince()
        try:
            workers = await self._start()
        except EngineLostError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise start_error(self.name, error, printed.lines()) from None
        return {"name": self.name, "pid": os.getpid(), "worker_pids": workers, "start_s": time.time() - began}

    async def _start(self) -> list[int]:
        """Start the engine; returns the process ids of its workers."""
        with large_imports():
            from vllm import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            from posttrain.sampling import vllm_extension  # noqa: F401  (registers the backend before the fork)

        arguments = AsyncEngineArgs(**{**engine_arguments(self._model, self._engine_config), **self._cache_size()})
        config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        kind = "AsyncScheduler" if config.scheduler_config.async_scheduling else "Scheduler"
        config.scheduler_config.scheduler_cls = f"posttrain.sampling.vllm_scheduler.{kind}"
        is_on_cpu = config.device_config.device_type == "cpu"
        die = partial(die_with_parent, os.getpid())
        with compat.forked_core(die) if is_on_cpu else contextlib.nullcontext():
            self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        self._tokenizer = self._llm.get_tokenizer()
        self._update_lock = asyncio.Lock()
        self._watch = Watch(
            self._engine_config.deadline_s,
            is_dead=lambda: self._llm.errored,
            is_busy=lambda: not self._is_updating and bool(self._outbox.open or self._is_wave),
            ping=self._llm.get_weight_version,
            say=self._say,
            on_lost=lambda: self._outbox.flush(),
        )
        self._outbox = Outbox(self._engine_config.stream_interval, self._hear)
        self._watching = asyncio.create_task(self._watch.run())
        self._progress = Progress.create()
        workers = await self._ask("start", self._llm.collective_rpc("die_with_parent"))
        await self._ask("start", self._llm.collective_rpc("note_progress", args=(self._progress.path,)))
        self._progress.unlink()
        await self._ask("start", self._llm.update_weight_version("0"))
        await self._ask("start", self._llm.get_supported_tasks())
        return workers

    def _cache_size(self) -> dict[str, int]:
        """On a CPU, the size of the KV cache if the config gives none."""
        if self._engine_config.kv_cache_gib is not None or not self._on_cpu:
            return {}
        config = read_model_config(self._model.path)
        length = engine_length(self._engine_config, self._model.path)
        size = cpu_kv_cache_bytes(config, self._model.dtype, self._engine_config, length=length)
        return {"kv_cache_memory_bytes": size}

    async def pids(self) -> dict[str, int]:
        """Process ids of the actor and of the engine's core."""
        return {"actor": os.getpid(), "core": compat.core_pid(self._llm)}

    # ------------------------------------------------------------------ pieces, while replies grow

    async def submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        """Admit requests under the caller's keys. Returns when the engine has them.

        Raises StageError, and admits none, if a key is in use, a request cannot be sampled or a wave is being sampled.
        Raises EngineLostError if the engine is lost.
        """
        self._watch.check()
        self._refuse_beside_wave()
        admitted: list[tuple[Reply, Any]] = []
        finished: list[Piece] = []
        keys = [key for key, _ in requests]
        if len(set(keys)) < len(keys) or any(key in self._outbox.open for key in keys):
            raise StageError(f"engine {self.name}: a key was submitted twice, among {sorted(keys)[:10]}")
        for key, request in requests:
            self._prepare(key, request, admitted, finished=finished)
        for reply, _ in admitted:  # before the first await, so that no other call takes the same key
            self._outbox.admit(reply)
        for piece in finished:
            self._outbox.add_piece(piece)
        for place, (reply, core_request) in enumerate(admitted):
            if self._outbox.open.get(reply.key, {}).get(reply.index) is not reply:
                continue  # cancelled while others were admitted
            await self._admit(reply, core_request)
            if place % ADMIT_AT_ONCE == ADMIT_AT_ONCE - 1:
                await asyncio.sleep(0)  # outputs are taken in meanwhile

    async def _admit(self, reply: Reply, core_request: Any) -> None:
        """Queue a request and send it to the core. It is called thousands of times a second, and waits for nothing."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await compat.admit(self._llm, core_request, reply.index, queue=reply, on_admitted=reply.follow)
        except EngineDeadError:
            raise self._watch.lose("its core process has died") from None

    async def collect(self, wait_s: float) -> tuple[list[Piece], float]:
        """Every piece since the last call, and the Unix time; waits up to `wait_s` for the first.

        Raises EngineLostError when the engine is lost; the tokens that were here before are returned first.
        """
        self._num_collecting += 1
        try:
            if self._watch.error is None:
                await self._outbox.wait(wait_s)
        finally:
            self._num_collecting -= 1
        pieces = self._outbox.take(self._decode)
        if not pieces:
            self._watch.check()
        return pieces, time.time()

    async def cancel(self, keys: Iterable[int]) -> None:
        """End requests and drop the pieces that were not collected. Keys that are not in the engine are ignored."""
        replies = [reply for key in keys for reply in self._outbox.remove(key)]
        if replies and self._watch.error is None:
            await self._alive(self._llm.abort([reply.request_id for reply in replies], internal=True))

    async def forget(self) -> None:
        """End every request of `submit`, and every `collect` that still waits.

        A `collect` of an earlier caller, which may have died, would take the pieces of the next caller.
        """
        await self.cancel(list(self._outbox.open))
        while self._num_collecting:
            self._outbox.wake()
            await asyncio.sleep(WAKE_S)

    def _prepare(self, key: int, request: SampleRequest, admitted: list[tuple[Reply, Any]], *, finished: list[Piece]):
        """Make the engine's request for each reply. A reply that is at its end already becomes a finished piece."""
        shared: Any = None  # replies that start from the prompt alone differ in their ids only
        for index, begun in enumerate(request.begun or ((),) * request.n):
            ended = self._end_of(begun, request)
            if ended:
                finished.append(Piece(key, index, len(begun), (), (), (), ended, self._decode(list(begun))))
                continue
            self._next_request += 1
            name = f"{self.name}-{self._next_request}"
            if begun or shared is None:
                prompt = [*request.prompt_ids, *begun]
                params = self._params(request, len(begun), stream=True)
                core_request = self._core_request(key, prompt, params, priority=request.priority)
                if not begun:
                    shared = core_request
            else:
                core_request = shared
            reply = Reply(self._outbox, key, index, request_id=name, begun=begun, choice_ids=request.choice_ids)
            admitted.append((reply, compat.named_copy(core_request, name)))

    def _core_request(self, key: int, prompt: list[int], params: Any, *, priority: int) -> Any:
        """vLLM's own request. Raises StageError if vLLM refuses it."""
        from vllm.exceptions import VLLMClientError

        try:
            return compat.prepare_request(self._llm, prompt, params, priority=priority)
        except (ValueError, VLLMClientError) as error:
            raise StageError(f"engine {self.name}: request {key} cannot be sampled: {error}") from None

    def _end_of(self, begun: tuple[int, ...], request: SampleRequest) -> FinishReason:
        """How a reply that was begun elsewhere has ended."""
        if begun and begun[-1] in request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(begun) >= request.max_tokens else FinishReason.RUNNING

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    # ------------------------------------------------------------------ whole replies

    async def generate_wave(
        self, requests: Sequence[SampleRequest], seed: int
    ) -> tuple[list[list[Completion]], float, float]:
        """Sample every request; the tokens depend on the weights, the requests and `seed` alone.

        Returns the completions by request, and the Unix times of the first start and the last end.

        The scheduler is held while the caches are emptied, the worker's generator is seeded and all requests are
        queued in their order; then nothing else is in the engine until they are finished. vLLM draws the tokens of a
        step from one generator in the order of its batch, so a request beside a wave would change its tokens: one that
        comes during a wave is refused. No request has a seed of its own: on a CPU vLLM ignores it where others in the
        batch have none (vllm-project/vllm#51226). Raises StageError if requests are in flight.
        """
        began = time.time()
        self._watch.check()
        self._refuse_for_wave(requests)
        async with self._update_lock:
            if self._outbox.open:
                raise StageError(f"engine {self.name}: a wave was asked for with other requests in flight")
            self._is_wave = True
            try:
                await self._ask("wave", compat.pause_between_steps(self._llm, clear_cache=True))
                await self._ask("wave", self._llm.collective_rpc("seed_sampling", args=(seed,)))
                queues = [await self._alive(self._add(request)) for request in requests]
                await self._ask("wave", self._llm.resume_generation())
                outputs = await self._alive(asyncio.gather(*(queue.get() for queue in queues)))
            finally:
                self._is_wave = False
        return [self._completions(output) for output in outputs], began, time.time()

    async def _add(self, request: SampleRequest) -> Any:
        from vllm.inputs.engine import tokens_input

        self._next_request += 1
        name = f"{self.name}-{self._next_request}"
        prompt, params = tokens_input(list(request.prompt_ids)), self._params(request)
        return await self._llm.add_request(name, prompt, params, priority=request.priority)

    def _refuse_beside_wave(self) -> None:
        if self._is_wave:
            raise StageError(
                f"engine {self.name}: a wave is being sampled, and a request beside it would change its tokens"
            )

    def _refuse_for_wave(self, requests: Sequence[SampleRequest]) -> None:
        if any(request.begun or request.choice_ids for request in requests):
            raise StageError(f"engine {self.name}: replies that were begun elsewhere, and choices, are for submit")

    def _params(self, request: SampleRequest, num_begun: int = 0, stream: bool = False) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1 if stream else request.n,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=1 if request.choice_ids else request.max_tokens - num_begun,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,  # the request names all ends; those of the engine's first folder may be of another model
            allowed_token_ids=list(request.choice_ids) if request.choice_ids else None,
            logprobs=len(request.choice_ids) if request.choice_ids else 0,
            flat_logprobs=True,
            detokenize=False,  # the whole reply is decoded at once when it is finished
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _completions(self, final: Any) -> list[Completion]:
        outputs = sorted(final.outputs, key=lambda output: output.index)
        return [self._completion(output) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        token_ids, flat = tuple(output.token_ids), output.logprobs
        logprobs = tuple(flat.logprobs[start] for start in flat.start_indices)
        versions = tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions or ())
        return Completion(
            token_ids=token_ids,
            text=self._decode(list(token_ids)),
            logprobs=logprobs,
            finish_reason=finish_reason_of(output.finish_reason),
            versions=versions,
        )

    # ------------------------------------------------------------------ weights

    async def update_weights(
        self, source: WeightSource, policy_version: int, kv: Literal["recompute", "keep"] = "recompute"
    ) -> tuple[float, float]:
        """Load new weights between two steps of the engine. Running requests continue with them.

        kv="recompute": the KV cache of running requests is computed again, so that every later token is exactly the new
        policy's. kv="keep": running requests continue on the KV cache of the old weights, so their later tokens belong
        to neither policy alone. The recorded log-probabilities are right in both cases. Cached prefixes of finished
        requests are always dropped, so that a later request never sees the old weights. Returns the Unix times of the
        pause's start and end.

        Raises EngineLostError, which names engine, version and tensor, when the update fails or makes no progress for
        `deadline_s`. Some weights may be new and others old then, so the engine is of no use.
        """
        async with self._update_lock:
            self._watch.check()
            began = time.time()
            self._is_updating = True
            try:
                what = f"the update to policy version {policy_version}"
                await self._ask(what, compat.pause_between_steps(self._llm, clear_cache=kv == "recompute"))
                await self._load(source, policy_version)
                if kv == "keep":
                    await self._ask(what, self._llm.reset_prefix_cache())
                await self._ask(what, self._llm.update_weight_version(str(policy_version)))
                self._policy_version = policy_version
                await self._ask(what, self._llm.resume_generation())
            finally:
                self._is_updating = False
                self._watch.heard()
            return began, time.time()

    async def _load(self, source: WeightSource, policy_version: int) -> None:
        """Wait for vLLM's workers to load `source`, as long as they make progress from tensor to tensor."""
        deadline_s = self._engine_config.deadline_s
        task = asyncio.ensure_future(self._alive(self._llm.collective_rpc("apply_weights", args=(to_plain(source),))))
        seen, since = self._progress.read(), time.monotonic()
        while True:
            await asyncio.wait({task}, timeout=look_every_s(deadline_s))
            now = self._progress.read()
            if now != seen:
                seen, since = now, time.monotonic()
            what = f"the update to policy version {policy_version}, at {now[1] or 'its start'}"
            if task.done():
                error = task.exception()
                if error is None or self._watch.error is not None:
                    return task.result()
                raise self._watch.lose(f"{what}, failed: {error}")
            if time.monotonic() - since > deadline_s:
                task.cancel()
                raise self._watch.lose(f"{what}, stood still for {deadline_s:g} s")

    # ------------------------------------------------------------------ life and death

    def _say(self, message: str) -> str:
        return f"engine {self.name}, policy version {self._policy_version}: {message}"

    def _hear(self, output: Any) -> None:
        if isinstance(output, Exception):
            self._watch.lose(f"its core process has died ({type(output).__name__}: {output})")
        else:
            self._watch.heard()

    async def _alive(self, awaitable: Awaitable[T]) -> T:
        """The result, or EngineLostError as soon as the engine is known to be lost."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._watch.guard(awaitable)
        except EngineDeadError:
            raise self._watch.lose("its core process has died") from None

    async def _ask(self, what: str, awaitable: Awaitable[T]) -> T:
        """The core's answer. Raises EngineLostError if it does not come within `deadline_s`."""
        deadline_s = self._engine_config.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._alive(awaitable)
        except TimeoutError:
            raise self._watch.lose(f"{what}: no answer in {deadline_s:g} s") from None

    async def shutdown(self) -> None:
        """Stop the engine core; the actor is killed afterwards."""
        if self._llm is not None:
            self._watching.cancel()
            self._llm.shutdown()
