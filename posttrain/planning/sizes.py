"""Counts the parameters of a model by part. The model is built on torch's meta device, without memory or weights."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from posttrain.config.base import load_config
from posttrain.config.training import AdaptersConfig
from posttrain.errors import ConfigError
from posttrain.model.adapter_targets import unknown_targets
from posttrain.planning.config import ModelShape
from posttrain.resources import bundled, bundled_names

# A parameter belongs to the first part of which its name contains a text.
PARTS = {
    "embed_tokens": "embeddings", "lm_head": "head", "norm": "norms", "self_attn": "attention", "router": "router",
    "shared_expert": "shared expert", ".experts.": "routed experts", "feed_forward": "dense MLP", ".mlp.": "dense MLP",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of parameters of a model.

    parts: {part: number}. active: number that one token uses. largest: number in the largest module, with all its
    experts. config: the transformers config. native: True for our Llama 4, whose experts and activations are known.
    adapters: number in the adapters, which `total` leaves out.
    """

    parts: dict[str, int]
    active: int
    largest: int
    config: Any
    native: bool
    adapters: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def experts(self) -> int:
        """Parameters that expert parallelism divides."""
        return self.parts.get("routed experts", 0)


def find_model(name: str) -> Path:
    """The file of a model by name: a YAML of sizes, a config.json, the folder of one, or a bundled name.

    Raises ConfigError if there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.exists():
        return path
    if f"models/{name}" in bundled_names("configs"):
        return bundled("configs", f"models/{name}")
    known = [item.removeprefix("models/") for item in bundled_names("configs") if item.startswith("models/")]
    raise ConfigError(name, [f"no such file or folder, and no bundled model of that name; bundled: {', '.join(known)}"])


def read_config(path: Path) -> Any:
    """The transformers config from a YAML of sizes or a config.json. Of a multimodal model, that of its text model.

    Raises ConfigError for a file that cannot be read or has an unknown architecture.
    """
    if path.suffix in (".yaml", ".yml"):
        from transformers import Llama4TextConfig

        return Llama4TextConfig(**load_config(ModelShape, path).fields())
    from transformers import AutoConfig

    try:
        json.loads(path.read_text())
        return AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(str(path), [f"not a config.json that transformers can read: {reason}"]) from None


def adapter_parameters(shapes: Mapping[str, Sequence[int]], lora: AdaptersConfig) -> int:
    """Number of parameters of the adapters of a model whose weights have these names and shapes."""
    lora = lora.filled()
    total = 0
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        last = module.rpartition(".")[2]
        linear = len(shape) == 2 and parameter == "weight" and last in (lora.target_modules or ())
        stacked = len(shape) == 3 and f"{last}.{parameter}" in (lora.target_parameters or ())
        if linear or stacked:
            total += (lora.rank or 0) * prod(shape[:-2]) * (shape[-2] + shape[-1])
    return total


def count_sizes(config: Any, lora: AdaptersConfig | None = None) -> Sizes:
    """Count the parameters of the model that `config` describes, and of its adapters.

    Raises ConfigError if `lora` names what the model does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.model.native import NativeLlama4ForCausalLM

    native = config.model_type == "llama4_text"
    with torch.device("meta"):
        model: Any = NativeLlama4ForCausalLM(config) if native else AutoModelForCausalLM.from_config(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[next((part for key, part in PARTS.items() if key in name), "other")] += parameter.numel()
    routed = parts["routed experts"] if native else 0
    idle = routed - routed * config.num_experts_per_tok // config.num_local_experts if routed else 0
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    active = sum(parts.values()) - idle
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    adapters = 0
    if lora is not None:
        if problems := unknown_targets(shapes, lora):
            raise ConfigError("plan", problems)
        adapters = adapter_parameters(shapes, lora)
    return Sizes({k: v for k, v in parts.items() if v}, active, largest, config, native, adapters)
