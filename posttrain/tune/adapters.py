"""LoRA: the peft config for a model, and the folder for the adapters."""

from typing import Any

from posttrain.config.training import LoraConfig
from posttrain.errors import ConfigError


def adapter_config(model: Any, lora: LoraConfig) -> Any:
    """The `peft.LoraConfig` for a model.

    Each linear module gets one adapter. A weight that holds all E experts, [E, M, N], gets an adapter of rank r =
    `lora.rank` for each expert: A [E r, N], B [M, E r]. Raises `ConfigError` for a target that the model lacks.
    """
    from peft import LoraConfig as PeftLoraConfig
    from torch import nn

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stacked = {".".join(name.split(".")[-2:]) for name, parameter in model.named_parameters() if parameter.dim() == 3}
    _check_known("target_modules", lora.target_modules, linear, what="linear modules")
    _check_known("target_parameters", lora.target_parameters, stacked, what="weights of all experts in one")
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (any number works)
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        target_parameters=list(lora.target_parameters) or None,
        task_type="CAUSAL_LM",
    )


def adapter_folder(lora: LoraConfig | None) -> str | None:
    """The name of the folder for the adapters, below the stage's; None if they are only merged into the model."""
    return None if lora is None else {"merged": None, "adapter": "model", "both": "adapter"}[lora.save]


def _check_known(key: str, names: list[str], known: set[str], *, what: str) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        rule = f"the {what} of this model are {', '.join(sorted(known))}" if known else f"this model has no {what}"
        raise ConfigError(f"lora.{key}", [f"got {', '.join(missing)}: {rule}"])
