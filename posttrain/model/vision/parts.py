"""The three parts of a multimodal Llama 4 by name, and which of them a training changes.

`vision` is the encoder with its adapter, `projector` the layer from its width to the text model's, `text` the rest.
"""

from collections.abc import Collection, Iterator

from torch import nn

from posttrain.config.training import PARTS, Part

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


def parameters_of(model: nn.Module, part: Part) -> Iterator[nn.Parameter]:
    """The parameters of one part."""
    return (weight for name, weight in model.named_parameters() if part_of(name) == part)


def freeze(model: nn.Module, frozen: Collection[Part]) -> None:
    """Train no weight of these parts. Weights that are frozen already, such as those under adapters, stay so."""
    for part in frozen:
        for weight in parameters_of(model, part):
            weight.requires_grad_(False)
