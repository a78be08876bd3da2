"""One vLLM engine in a Ray actor: samples, takes new weights in flight, and says which weights sampled which token.

What waits for what: `generate` calls wait for the engine; `update_weights` pauses the scheduler between two steps,
swaps the weights and resumes, so running requests continue under the new version; nothing else waits.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.config.shared import EngineConfig, ServedModelConfig
from posttrain.errors import StageError
from posttrain.records import VersionSpan
from posttrain.sampling.requests import Completion, SampleRequest

UPDATE_DEADLINE_S = 600.0

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
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel,
        "gpu_memory_utilization": engine.gpu_memory_fraction,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.prefix_caching,
        "logprobs_mode": "processed_logprobs",  # those of the distribution that the tokens are drawn from
        "worker_extension_cls": "posttrain.sampling.vllm_extension.WorkerExtension",
        "weight_transfer_config": {"backend": "shm"},
        "generation_config": "vllm",  # the request alone decides how to sample
        "disable_log_stats": True,
        "seed": 0,
        "trust_remote_code": False,
    }
    if engine.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    text = read_model_config(model.path)
    if text.get("attn_temperature_tuning"):
        # vLLM turns attention temperature off for short contexts unless it is told to keep it.
        arguments["override_generation_config"] = {"attn_temperature_tuning": True}
    return arguments


def read_model_config(path: str) -> dict[str, Any]:
    """The text part of a model folder's config.json."""
    config = json.loads((Path(path) / "config.json").read_text())
    return config.get("text_config", config)


class EngineActor:
    """A vLLM `AsyncLLM`. Made a Ray actor by the registry; every method is a coroutine of one event loop."""

    def __init__(self, name: str, model: dict[str, Any], engine: dict[str, Any]):
        os.environ.update(ENGINE_ENV)
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            # Forked from a process that has vLLM imported, the engine core starts in half the time.
            os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"
            # vLLM would have a C++ compiler make one small function, whatever `enforce_eager` says.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        self.name = name
        self._model = ServedModelConfig(**model)
        self._engine_config = EngineConfig(**engine)
        self._llm: Any = None
        self._tokenizer: Any = None
        self._next_request = 0
        self._policy_version = 0
        self._update_lock: asyncio.Lock | None = None

    async def where(self) -> tuple[str, int]:
        """The id of this node in Ray, and of this process."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def start(self) -> dict[str, Any]:
        """Start the engine; returns its name, process ids and start-up seconds."""
        began = time.time()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from posttrain.sampling import vllm_extension  # noqa: F401  (registers the backend before the fork)

        arguments = engine_arguments(self._model, self._engine_config)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._tokenizer = self._llm.get_tokenizer()
        self._update_lock = asyncio.Lock()
        workers = await self._llm.collective_rpc("die_with_parent")
        await self._llm.update_weight_version("0")
        return {"name": self.name, "pid": os.getpid(), "worker_pids": workers, "start_s": time.time() - began}

    async def generate(self, requests: Sequence[SampleRequest]) -> tuple[list[list[Completion]], float, float]:
        """Sample every request; returns completions by request, and the Unix times of the first start and last end."""
        began = time.time()
        results = await asyncio.gather(*(self._generate_one(request) for request in requests))
        return results, began, time.time()

    async def _generate_one(self, request: SampleRequest) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=request.n,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=1 if request.choice_ids else request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            allowed_token_ids=list(request.choice_ids) if request.choice_ids else None,
            logprobs=len(request.choice_ids) if request.choice_ids else 0,
            flat_logprobs=request.choice_ids is None,
            detokenize=False,  # the whole reply is decoded at once when it is finished
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        self._next_request += 1
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        final = None
        async for output in self._llm.generate(prompt, params, f"{self.name}-{self._next_request}"):
            final = output
        if final is None:
            raise StageError(f"engine {self.name} ended a request without an answer")
        outputs = sorted(final.outputs, key=lambda output: output.index)
        return [self._completion(output, request) for output in outputs]

    def _completion(self, output: Any, request: SampleRequest) -> Completion:
        token_ids = tuple(output.token_ids)
        choices: dict[int, float] = {}
        if request.choice_ids:
            first = output.logprobs[0]
            choices = {token: first[token].logprob for token in request.choice_ids if token in first}
            logprobs = (first[token_ids[0]].logprob,)
        else:
            flat = output.logprobs
            logprobs = tuple(flat.logprobs[start] for start in flat.start_indices)
        versions = tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions or ())
        return Completion(
            token_ids=token_ids,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            logprobs=logprobs,
            finish_reason=output.finish_reason or "abort",
            versions=versions,
            choice_logprobs=choices,
        )

    async def update_weights(
        self, source: dict[str, Any], policy_version: int, kv: Literal["recompute"] = "recompute"
    ) -> tuple[float, float]:
        """Swap in new weights between two steps; running requests go on under them.

        source: `WeightManifest.to_json()`, or {"folder": path}. kv="recompute": the KV cache of running requests is
        computed again, so that every later token is exactly the new policy's. Returns the Unix times of the pause's
        start and end. Raises StageError, naming engine and version, when the update fails or takes over ten minutes.
        """
        assert self._update_lock is not None
        async with self._update_lock:
            began = time.time()
            try:
                async with asyncio.timeout(UPDATE_DEADLINE_S):
                    await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=kv == "recompute")
                    await self._llm.collective_rpc("apply_weights", args=(source,))
                    await self._llm.update_weight_version(str(policy_version))
                    await self._llm.resume_generation()
            except TimeoutError:
                raise StageError(
                    f"engine {self.name} did not take policy version {policy_version} within {UPDATE_DEADLINE_S:.0f} s"
                ) from None
            self._policy_version = policy_version
            return began, time.time()

    async def shutdown(self) -> None:
        """Stop the engine core; the actor is killed afterwards."""
        if self._llm is not None:
            self._llm.shutdown()
