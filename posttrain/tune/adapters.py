"""LoRA: the peft config for a model, and the folder for the adapters."""

from collections.abc import Collection
from typing import Any

from posttrain.config.training import AdaptersConfig, LoraConfig, Part
from posttrain.errors import ConfigError
from posttrain.model.adapter_targets import unknown
from posttrain.model.vision.parts import modules_pattern, part_of


def adapter_config(model: Any, lora: AdaptersConfig, frozen: Collection[Part] = ()) -> Any:
    """The `peft.LoraConfig` for a model. frozen: its parts that get no adapters.

    Each linear module gets one adapter. A weight that holds all E experts, [E, M, N], gets an adapter of rank r =
    `lora.rank` for each expert: A [E r, N], B [M, E r]. Raises `ConfigError` for a target that the model lacks.
    """
    from peft import LoraConfig as PeftLoraConfig
    from torch import nn

    lora = lora.filled()
    head = model.get_output_embeddings()  # whose weight is read without the layer, so an adapter would not be used
    modules = [name for name, item in model.named_modules() if isinstance(item, nn.Linear) and item is not head]
    linear = {name.rpartition(".")[2] for name in modules if part_of(name) not in frozen}
    weights = [name for name, weight in model.named_parameters() if weight.dim() == 3 and part_of(name) not in frozen]
    stacked = {".".join(name.split(".")[-2:]) for name in weights}
    problems = [
        *unknown("target_modules", lora.target_modules, linear, what="linear modules"),
        *unknown("target_parameters", lora.target_parameters, stacked, what="weights of all experts in one"),
    ]
    if problems:
        raise ConfigError("config", problems)
    return PeftLoraConfig(
        r=lora.rank,  # pyright: ignore[reportArgumentType]  (filled in)
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (any number works)
        lora_dropout=lora.dropout if isinstance(lora, LoraConfig) else 0.0,
        target_modules=list(lora.target_modules or ()),
        target_parameters=list(lora.target_parameters or ()) or None,
        exclude_modules=modules_pattern(frozen) if frozen else None,
        task_type="CAUSAL_LM",
    )


def adapter_folder(lora: AdaptersConfig | None) -> str | None:
    """The name of the folder for the adapters, below the stage's; None if they are only merged into the model."""
    return None if lora is None else {"merged": None, "adapter": "model", "both": "adapter"}[lora.save]
