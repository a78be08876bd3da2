"""Attention of a Llama 4 layer.

A layer is of one of two sorts. Most have rotary positions, and may normalise queries and keys. The others have no
positions; instead, their queries may be scaled by a temperature that grows with the position.

Shapes: B rows, S tokens of a row, D hidden, H query heads, d channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Llama4TextConfig
from transformers.cache_utils import Cache

from posttrain.model.norm import unit_rms
from posttrain.model.rope import attention_temperature, rotate
from posttrain.model.visibility import Visibility


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of the tokens of one forward, in the form in which every layer needs them.

    rotations_BS1d: complex rotary factors, [B or 1, S, 1, head_dim / 2]. slots_BS: int64, the position from which the
    temperature of a token is computed. visibility: which token sees which, for each kind of layer that the config
    names: {"full_attention": ..., "chunked_attention": ...}.
    """

    rotations_BS1d: torch.Tensor
    slots_BS: torch.Tensor
    visibility: dict[str, Visibility]


class Attention(nn.Module):
    """Grouped-query attention. Parameter names follow transformers' Llama4TextAttention."""

    def __init__(self, config: Llama4TextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.kind = list(config.layer_types or ())[layer_idx]
        self.use_rope = bool(list(config.no_rope_layers or ())[layer_idx])  # despite the name, 1 means rotary
        self.use_qk_norm = bool(config.use_qk_norm) and self.use_rope
        width, key_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_BSD: torch.Tensor, positions: Positions, cache: Cache | None = None) -> torch.Tensor:
        """Return the attention output [B, S, D]. Appends the new keys and values to `cache`, if one is given."""
        heads = (*x_BSD.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x_BSD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.use_rope:
            q, k = rotate(q, positions.rotations_BS1d), rotate(k, positions.rotations_BS1d)
        if self.use_qk_norm:
            q, k = unit_rms(q, self.config.rms_norm_eps), unit_rms(k, self.config.rms_norm_eps)
        if self.config.attn_temperature_tuning and not self.use_rope:
            q = q * attention_temperature(positions.slots_BS, self.config.floor_scale, self.config.attn_scale).to(
                q.dtype
            )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        dropout = self.config.attention_dropout if self.training else 0.0
        out_BHSd = positions.visibility[self.kind].attend(q, k, v, dropout=dropout)
        return self.o_proj(out_BHSd.transpose(1, 2).reshape(*x_BSD.shape[:-1], -1))
