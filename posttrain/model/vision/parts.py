"""The three parts of a multimodal Llama 4 by name, and which of them a training changes.

`vision` is the encoder with its adapter, `projector` the layer from its width to the text model's, `text` the rest.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.config.training import PARTS, Part
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

_PREFIX: dict[Part, str] = {
    "vision": "vision_model.",
    "projector": "multi_modal_projector.",
    "text": "language_model.",
}


def part_of(name: str) -> Part | None:
    """The part that a parameter or module belongs to, by its dotted name; wrappers' prefixes are allowed.

    None for a name of no part, such as one of a text-only model.
    """
    return next((part for part in PARTS if f".{_PREFIX[part]}" in f".{name}."), None)


def parameters_of(model: "nn.Module", part: Part) -> "Iterator[nn.Parameter]":
    """The parameters of one part."""
    return (weight for name, weight in model.named_parameters() if part_of(name) == part)


def freeze(model: "nn.Module", frozen: Collection[Part]) -> None:
    """Train no weight of these parts. Weights that are frozen already, such as those under adapters, stay so."""
    for part in frozen:
        for weight in parameters_of(model, part):
            weight.requires_grad_(False)


def modules_pattern(parts: Collection[Part]) -> str:
    """A regular expression that matches the names of all modules of these parts, and of no others.

    It is the same for the same parts in any order.
    """
    return rf"(.*\.)?({'|'.join(re.escape(_PREFIX[part]) for part in PARTS if part in parts)}).*"


def parameter_groups(model: "nn.Module", rates: Mapping[Part, float]) -> list[dict[str, Any]]:
    """The trained parameters of a model as an optimizer takes them: those of each part with a rate of its own apart.

    The first group has the optimizer's rate, unless each part has its own. Raises `ConfigError` for a part of which
    nothing is trained.
    """
    trained = [(part_of(name), weight) for name, weight in model.named_parameters() if weight.requires_grad]
    rest = [weight for part, weight in trained if part not in rates]
    groups: list[dict[str, Any]] = [{"name": "rest", "params": rest}] if rest else []
    for part, rate in rates.items():
        own = [weight for of, weight in trained if of == part]
        if not own:
            rule = "no weight of it is trained: lora has no target in it, or the model has no such part"
            raise ConfigError("images.learning_rates", [f"got {part}: {rule}; remove it"])
        groups.append({"name": part, "params": own, "lr": rate})
    return groups
