"""Rotary positions on interleaved pairs of channels, and the attention temperature of layers without them.

Left out: rotary scalings whose frequencies change with the length of the input (dynamic, longrope); no Llama 4
checkpoint uses them.
"""

from typing import Any

import torch
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED_SCALINGS = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(config: Llama4TextConfig) -> tuple[torch.Tensor, float]:
    """The rotary frequencies that `config.rope_parameters` describes.

    Returns:
        (fp32 [head_dim / 2], radians that each pair of channels turns by per position; factor on the rotated vectors).

    Raises:
        ValueError: the frequencies of this rope type are not fixed.
    """
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _FIXED_SCALINGS:
        raise ValueError(f"rope_type is {rope_type!r}; supported: {', '.join(_FIXED_SCALINGS)} (config.json)")
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0


def rotations(position_ids_BS: torch.Tensor, inverse_frequencies_D: torch.Tensor, factor: float) -> torch.Tensor:
    """Complex numbers [B, S, 1, head_dim / 2] that turn each pair of channels by its angle, of length `factor`."""
    angles = position_ids_BS[..., None].float() * inverse_frequencies_D
    turns = torch.polar(torch.ones_like(angles), angles)
    return (turns if factor == 1.0 else turns * factor)[:, :, None, :]


def rotate(x_BSHd: torch.Tensor, rotations_BS1d: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (0, 1), (2, 3), ... of each head. Llama 3 in transformers pairs other channels.

    The pairs are multiplied as complex numbers. On a CPU this is six times faster than slicing even and odd channels.
    """
    pairs = torch.view_as_complex(x_BSHd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_BS1d).flatten(-2).type_as(x_BSHd)


def attention_temperature(position_ids_BS: torch.Tensor, floor_scale: int, attn_scale: float) -> torch.Tensor:
    """A factor on the queries, [B, S, 1, 1]: 1 for the first tokens, then growing with the log of the position.

    It is 1 before position floor_scale - 1, and grows in steps of `floor_scale` tokens.

    Source: "Scalable-Softmax" (arXiv 2501.19399), in the stepwise form of Llama 4.
    """
    steps = torch.floor((position_ids_BS.float() + 1.0) / floor_scale)
    return (torch.log1p(steps) * attn_scale + 1.0)[..., None, None]
