"""How many tokens a model can hold, from its config.json alone.

The rule is vLLM's, whose engines refuse a longer `max_model_len`: the smallest length that the config names, times the
factor of its rotary scaling where the config gives the length without that factor.
"""

from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.engines import EngineConfig
from posttrain.files import read_object

# Under these names configs keep the number of positions. Command-R's own name comes first, and overrides the others.
OWN_KEY = "model_max_length"
KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# Kinds of rotary scaling whose configs give the length that the scaling leads to.
ALREADY_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


class ModelLength(NamedTuple):
    """tokens: of prompt and reply together. key: where config.json says so."""

    tokens: int
    key: str


def model_length(folder: str | Path) -> ModelLength | None:
    """The length of the model in a folder; None if its config.json does not say, or cannot be read."""
    whole = read_object(Path(folder).expanduser() / "config.json")
    if whole is None:
        return None
    text = whole.get("text_config")
    config = text if isinstance(text, dict) else whole
    named = {key: value for key in KEYS if isinstance(value := config.get(key), int) and value > 0}
    if isinstance(own := config.get(OWN_KEY), int) and own > 0:
        named = {OWN_KEY: own}
    if not named:
        return None
    key = min(named, key=lambda name: named.get(name, inf))
    if "gemma3" in str(config.get("model_type")):
        return ModelLength(named[key], key)
    factors = [factor for rope in _ropes(config) if (factor := _factor(rope)) is not None]
    return ModelLength(int(named[key] * (factors[-1] if factors else 1)), key)


def engine_length(engine: EngineConfig, folder: str | Path) -> int:
    """Most tokens of a prompt and its reply on this engine: what was asked for, else as many as the model can hold."""
    if engine.max_model_len is not None:
        return engine.max_model_len
    can_hold = model_length(folder)
    return engine.length if can_hold is None else min(engine.length, can_hold.tokens)


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters, one mapping for each kind of layer where they differ."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, Mapping):
        return
    inner = [part for part in found.values() if isinstance(part, Mapping)]
    yield from inner or [found]


def _factor(rope: Mapping[str, Any]) -> float | None:
    """The factor by which a rotary scaling lengthens what the config says; None if it does not."""
    kind = rope.get("rope_type", rope.get("type"))
    factor = rope.get("factor")
    return factor if kind not in ALREADY_SCALED and isinstance(factor, int | float) else None
