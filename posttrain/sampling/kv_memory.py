"""How much memory an engine on a CPU takes for its KV cache if its config does not say.

vLLM would take nine tenths of the machine's memory, whatever else runs there, and not start if less is free. Here the
cache is as large as the engine can use, and leaves most of the free memory to the trainer and other engines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from posttrain.config.engines import EngineConfig

BYTES = {"float32": 4, "bfloat16": 2}
FREE_SHARE = 4  # one part in so many of the free memory
# Tokens of a block of the cache on a CPU, unless the config gives them. vLLM's own default there is 128; only whole
# blocks are shared between requests, so that shorter prompts would be computed once for each reply.
CPU_BLOCK = 32
UNKNOWN = 1 << 30  # for a model whose config has other names for its sizes
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def cpu_kv_cache_bytes(
    config: Mapping[str, Any], dtype: str, engine: EngineConfig, *, length: int, free: int | None = None
) -> int:
    """Bytes for `engine.max_num_seqs` sequences of `length` tokens, at most a quarter of the free memory.

    It is never less than one sequence needs, without which no engine starts: then vLLM says how much is missing.
    config: the text part of the model's config.json. free: bytes; None asks the system.
    """
    quarter = (free_bytes() if free is None else free) // FREE_SHARE
    token = token_bytes(config, dtype)
    if token is None:
        return min(UNKNOWN, quarter)
    block = engine.block_size or CPU_BLOCK
    sequence = token * block * (-(-length // block) + 1)  # vLLM keeps one block for itself
    return max(min(sequence * engine.max_num_seqs, quarter), 2 * sequence)


def token_bytes(config: Mapping[str, Any], dtype: str) -> int | None:
    """Bytes of the keys and values of one token in all layers; None if the config does not give the sizes."""
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    return 2 * layers * kv_heads * head * BYTES[dtype]


def free_bytes() -> int:
    """Memory of this machine that is free, at most the limit of a container."""
    free = psutil.virtual_memory().available
    try:
        return min(free, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no limit: the file is absent, or says `max`
        return free
