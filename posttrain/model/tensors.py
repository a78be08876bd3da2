"""Which tensors a model folder lacks, by its config.json and the headers of its weight files alone.

For the text model of Llama 4 the names of all tensors are known. In other models whose layers are all alike (UNIFORM),
each layer needs what any of them has. Left out: models of other types, quantized weights and image tensors, which are
checked when they are loaded; shapes, too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.model.folder import quantization, read_header

LLAMA4 = ("llama4", "llama4_text")
UNIFORM = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SHOWN = 3


def missing_tensor_problems(folder: Path) -> list[str]:
    """One line if the weights lack tensors that config.json asks for, else an empty list.

    A folder whose files cannot be read has none here: the other checks of a folder report it.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {name for path in folder.glob("*.safetensors") for name in read_header(path)}
    except (OSError, ValueError):
        return []
    if not isinstance(config, dict) or not names or quantization(folder) is not None:
        return []
    missing = [name for name in _needed(config, names) if name not in names]
    if not missing:
        return []
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return [
        f"has weights without {len(missing)} of the tensors that its config.json asks for: "
        f"{', '.join(missing[:_SHOWN])}{more}; copy or download the weights again, or give the config.json that "
        "belongs to them"
    ]


def _needed(config: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    kind = config.get("model_type")
    text = config.get("text_config") if kind == "llama4" else config
    if not isinstance(text, dict) or not isinstance(text.get("num_hidden_layers"), int):
        return
    if kind in LLAMA4:
        prefix = "language_model." if kind == "llama4" else ""
        yield from (prefix + name for name in llama4_tensors(text))
    elif kind in UNIFORM:
        yield from ("model.embed_tokens.weight", "model.norm.weight")
        parts = {match[2] for name in names if (match := _LAYER.match(name))}
        layers = range(text["num_hidden_layers"])
        yield from (f"model.layers.{layer}.{part}" for layer in layers for part in sorted(parts))


def llama4_tensors(config: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tensors of a Llama 4 text model. config: its config.json, with num_hidden_layers."""
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight"
    layers, step = config["num_hidden_layers"], config.get("interleave_moe_layer_step") or 1
    routed = config.get("moe_layers")
    routed = set(range(step - 1, layers, step) if routed is None else routed)
    kinds = ("weight", "bias") if config.get("attention_bias") else ("weight",)
    for layer in range(layers):
        start = f"model.layers.{layer}"
        yield from (f"{start}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm"))
        yield from (f"{start}.self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in kinds)
        forward = f"{start}.feed_forward"
        if layer in routed:
            yield from (f"{forward}.{name}" for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"))
            forward = f"{forward}.shared_expert"
        yield from (f"{forward}.{name}.weight" for name in _PROJECTIONS)
