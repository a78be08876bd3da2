"""LoRA: the adapter that a trainer is given, and the plain model that comes out of it."""

from typing import Any

from posttrain.config.shared import LoraConfig
from posttrain.errors import ConfigError


def adapter_config(model: Any, lora: LoraConfig) -> Any:
    """The `peft.LoraConfig` for a model; raises `ConfigError` if a target is not one of its linear modules."""
    from peft import LoraConfig as PeftLoraConfig
    from torch import nn

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in lora.target_modules if name not in linear]
    if missing:
        rule = f"the linear modules of this model are {', '.join(sorted(linear))}"
        raise ConfigError("lora.target_modules", [f"got {', '.join(missing)}: {rule}"])
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (any number works)
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def merged(model: Any) -> Any:
    """The model with its adapters added into its weights; a model without adapters as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
