"""Training that starts from a folder of adapters and goes on training them: what they are, and what may be asked of it.

The settings of the adapters count. A section `lora` may leave them out or repeat them, and sets only what does not
change the adapters: dropout and what is written. Left out: forms of LoRA that the section cannot describe, such as DoRA
or a rank of its own for some modules; their training cannot be continued, but they can be merged.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.images import ImagesConfig, TrainedImagesConfig
from posttrain.config.models import ServedModelConfig, TunedModelConfig
from posttrain.config.training import PARTS, AdaptersConfig, LoraConfig, Part
from posttrain.errors import ConfigError
from posttrain.files import read_object
from posttrain.model.adapter import CONFIG, WEIGHTS, base_folder, is_adapter
from posttrain.model.folder import read_header
from posttrain.model.vision.parts import modules_pattern, part_of

# Settings of peft that the section `lora` has no key for.
_MORE_THAN_PLAIN = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules",
    "fan_in_fan_out", "lora_bias",
)  # fmt: skip
# Values of exclude_modules that `images.freeze` writes, by which it can be continued.
_FROZEN = [modules_pattern(parts) for count in (1, 2) for parts in combinations(PARTS, count)]
L = TypeVar("L", bound=AdaptersConfig)
_SHAPE = ("rank", "alpha", "target_modules", "target_parameters")


def continues(model: ServedModelConfig) -> bool:
    """Whether a stage with this section `model` goes on training the adapters in its folder."""
    return isinstance(model, TunedModelConfig) and model.adapters == "continue" and is_adapter(model.path)


def adapted_parts(path: str | Path) -> frozenset[Part]:
    """The parts of a multimodal model that the adapters in a folder adapt; none for adapters of a text model."""
    try:
        names = read_header(Path(path).expanduser() / WEIGHTS)
    except (OSError, ValueError):
        return frozenset()  # a fault of the folder, which `adapter_problems` names
    return frozenset(part for name in names if (part := part_of(name)) is not None)


def started_lora(model: ServedModelConfig, lora: L | None, images: ImagesConfig | None = None) -> L | LoraConfig | None:
    """The section `lora` without nulls, as a stage trains by it; None if it trains all weights.

    images: the section of a stage that trains with pictures. If adapters are continued there is always a section.
    Raises ConfigError if it disagrees with the adapters.
    """
    if not continues(model):
        return lora.filled() if lora is not None else None
    if problems := start_problems(model, lora, images):
        raise ConfigError("config", problems)
    return (lora or LoraConfig()).filled(adapter_settings(model.path))


def start_problems(
    model: ServedModelConfig, lora: AdaptersConfig | None, images: ImagesConfig | None = None
) -> list[str]:
    """Why the adapters that a stage starts from cannot be trained on as the config says, one line each; keys first."""
    if not continues(model):
        return []
    config = _read(model.path)
    merge = "model.adapters: merge, to add them into their base and start from the whole model"
    it = f"model.path: got {model.path!r}: its adapters"
    parts = adapted_parts(model.path)
    if parts and images is None:
        return [f"{it} are those of a multimodal model; set images: {{}} to train them on, or {merge}"]
    if isinstance(images, TrainedImagesConfig) and (frozen := [part for part in images.freeze if part in parts]):
        return [f"images.freeze: got {', '.join(frozen)}, which the adapters in model.path {model.path!r} adapt, and "
                f"the training continues them; leave it out, or set {merge}"]  # fmt: skip
    odd = [f"{name} {config[name]!r}" for name in _MORE_THAN_PLAIN if config.get(name)]
    if odd and not (config.get("exclude_modules") in _FROZEN and len(odd) == 1):
        return [f"{it} have {', '.join(odd)}, which `lora` has no key for: they cannot be trained on; set {merge}"]
    if isinstance(pattern := config["target_modules"], str):
        return [f"{it} name modules by the pattern {pattern!r}; list the names in its {CONFIG}, or set {merge}"]
    if not pattern and not config["target_parameters"]:
        return [f"{it} name no modules; list their names as target_modules in its {CONFIG}"]
    if "lm_head" in pattern:
        return [f"{it} adapt lm_head, whose adapter would not be trained; set {merge}"]
    held = adapter_settings(model.path)
    problems = []
    for name in _SHAPE if lora is not None else ():
        asked, there = getattr(lora, name), getattr(held, name)
        same = asked is None or (sorted(asked) == sorted(there) if isinstance(asked, list) else asked == there)
        if not same:
            problems.append(
                f"lora.{name}: got {asked}, but the adapters in model.path {model.path!r} have {there}, and the "
                f"training continues them; leave the key out, or set {merge}"
            )
    if isinstance(lora, LoraConfig) and lora.dropout and held.target_parameters:
        problems.append(
            f"lora.dropout: got {lora.dropout}, but the adapters in model.path {model.path!r} adapt experts, which no "
            "dropout goes through: set dropout: 0.0"
        )
    return problems


def adapter_settings(path: str | Path) -> LoraConfig:
    """The section `lora` that describes the adapters in a folder."""
    config = _read(path)
    return LoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        target_modules=sorted(config["target_modules"]),
        target_parameters=sorted(config["target_parameters"]),
    )


def adapter_note(key: str, model: ServedModelConfig) -> str | None:
    """A sentence about the folder of adapters that a section `model` names, for people; None for a whole model.

    key: key path of the section.
    """
    if not is_adapter(model.path):
        return None
    config = _read(model.path)
    modules = config["target_modules"]
    names = [*([modules] if isinstance(modules, str) else modules), *config["target_parameters"]]
    use = "the training continues them" if continues(model) else "they are merged into it before the stage starts"
    return (
        f"{key}.path holds adapters, rank {config['r']}, of {', '.join(sorted(names))}; they need the base "
        f"{base_folder(model.path)}; {use}"
    )


def _read(path: str | Path) -> Mapping[str, Any]:
    """The adapters' configuration, with peft's values for what it does not say."""
    found = read_object(Path(path).expanduser() / CONFIG) or {}
    given = {name: value for name, value in found.items() if value is not None}
    return {"r": 8, "lora_alpha": 8, "target_modules": [], "target_parameters": [], **given}
