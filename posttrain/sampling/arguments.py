"""What a vLLM engine is started with: the environment variables of its process, and the arguments of the engine."""

import json
import os
from pathlib import Path
from typing import Any

from posttrain.compat import vllm as compat
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.model.length import engine_length
from posttrain.sampling.kv_memory import CPU_BLOCK, cpu_kv_cache_bytes

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


PARTS = "VLLM_CPU_OMP_THREADS_BIND"  # vLLM's variable for the cores of the parts of an engine


def cpu_environment(engine: EngineConfig) -> dict[str, str]:
    """The further environment variables of an engine on a CPU.

    vLLM would have a C++ compiler make one small function, whatever `enforce_eager` says. It would give each part of an
    engine (`tensor_parallel`) a NUMA node of its own, and refuse more parts than nodes. Where there are fewer, the
    parts share all cores, with one thread each, as engines do; a value of the user stays.
    """
    variables = {"TORCHDYNAMO_DISABLE": "1"}
    if engine.tensor_parallel > num_memory_nodes():
        variables[PARTS] = os.environ.get(PARTS, "nobind")
    return variables


def num_memory_nodes(status: Path = Path("/proc/self/status")) -> int:
    """How many NUMA nodes this process may have memory of; 1 on a system that does not tell."""
    lines = status.read_text().splitlines() if status.exists() else []
    given = next((line.partition(":")[2] for line in lines if line.startswith("Mems_allowed_list:")), "0")
    ranges = [part.partition("-") for part in given.strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


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
    if engine.block_size is not None:
        arguments["block_size"] = engine.block_size
    return {**arguments, **compat.keep_attention_temperature(read_model_config(model.path))}


def cpu_cache_arguments(model: ServedModelConfig, engine: EngineConfig) -> dict[str, Any]:
    """The further arguments of an engine on a CPU: what the configuration does not say about its KV cache.

    Layers that attend within chunks keep all keys and values, like the others: with one kind of cache, replies share
    parts of blocks (posttrain/compat/vllm_prefixes.py), and the scheduler has one cache to look after.
    """
    arguments: dict[str, Any] = {"disable_hybrid_kv_cache_manager": True}
    if engine.block_size is None:
        arguments["block_size"] = CPU_BLOCK
    if engine.kv_cache_gib is None:
        length = engine_length(engine, model.path)
        size = cpu_kv_cache_bytes(read_model_config(model.path), model.dtype, engine, length=length)
        arguments["kv_cache_memory_bytes"] = size
    return arguments


def read_model_config(path: str) -> dict[str, Any]:
    """The text part of a model folder's config.json."""
    config = json.loads((Path(path) / "config.json").read_text())
    return config.get("text_config", config)
