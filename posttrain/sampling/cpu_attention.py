"""Whether vLLM's attention on a CPU can compute a model, from the sizes in its config.json.

vLLM does not look at them when an engine starts. Its core ends at the first request, and only its log says why.
Source: what vLLM's kernel accepts (the test asks it), and `make_local_attention_virtual_batches` of vLLM.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config.engines import EngineConfig
from posttrain.sampling.kv_memory import CPU_BLOCK

HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_REMEDY = "serve the model on a GPU (resources), or give another"


def attention_faults(config: Mapping[str, Any], engine: EngineConfig) -> Iterator[str]:
    """What an engine on a CPU cannot compute, with the remedy, one text each.

    config: the text part of the model's config.json.
    """
    head_dim = _head_dim(config)
    if head_dim is not None and head_dim not in HEAD_DIMS:
        yield (
            f"its attention heads have a size of {head_dim} (head_dim), and vLLM's attention on a CPU computes "
            f"{', '.join(map(str, HEAD_DIMS))}; {_REMEDY}"
        )
    chunk, block = _chunk(config), engine.block_size or CPU_BLOCK
    if chunk and chunk % block:
        yield (
            f"its layers attend within {chunk} tokens (attention_chunk_size), which must be a multiple of the {block} "
            f"tokens in a block of the KV cache; {_REMEDY if chunk % CPU_BLOCK else f'set block_size: {CPU_BLOCK}'}"
        )


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """The size of a head; None if the config does not give it, or if keys and values are compressed (MLA)."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if "kv_lora_rank" in config or not (isinstance(width, int) and isinstance(heads, int) and heads):
        return None
    given = config.get("head_dim")
    return given if isinstance(given, int) else width // heads


def _chunk(config: Mapping[str, Any]) -> int:
    """The tokens of a chunk; 0 if no layer attends within chunks. Of vLLM's models, those of Llama 4 do."""
    chunk = config.get("attention_chunk_size")
    return chunk if isinstance(chunk, int) and str(config.get("model_type", "")).startswith("llama4") else 0
