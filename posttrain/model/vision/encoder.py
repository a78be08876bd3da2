"""Llama 4's vision encoder: tiles of pictures to features, a few for each tile.

Every patch of a tile sees all patches of that tile, and tiles never see each other. Positions are rotary, from the
column and row of a patch, and learned ones are added before the first layer.

Shapes: N tiles, P patches of a tile (a square of G by G), C the encoder's width, h heads, d channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Llama4VisionConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.rope import rotate
from posttrain.model.vision.sizes import vision_sizes


def patches_of(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut tiles [N, 3, G * patch, G * patch] into patches [N, G * G, 3 * patch * patch], row by row.

    The values of a patch are ordered by channel, row and column, as the weights of Llama 4 expect.
    """
    tiles, channels, height, width = pixels.shape
    grid = pixels.reshape(tiles, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(tiles, -1, channels * patch * patch)


def pixel_shuffle(x_NPC: torch.Tensor, side: int) -> torch.Tensor:
    """Join squares of `side` by `side` patches: [N, P, C] -> [N, P / side**2, side**2 * C].

    Source: "Real-Time Single Image and Video Super-Resolution" (arXiv 1609.05158), the inverse of its operation.
    """
    tiles, patches, channels = x_NPC.shape
    grid = round(patches**0.5) // side
    squares = x_NPC.reshape(tiles, grid, side, grid, side, channels).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, grid * grid, side * side * channels)


def patch_rotations(config: Llama4VisionConfig) -> torch.Tensor:
    """Complex rotary factors of the patches and, last, of the class token: [1, P + 1, 1, d / 2].

    The first half of a head's channel pairs turns with the column of a patch, the second half with its row, and both
    are counted from 1. The class token does not turn.
    """
    grid = vision_sizes(config).grid
    half = config.hidden_size // config.num_attention_heads // 2
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, half, 2).float() / half)
    patch = torch.arange(grid * grid)
    angles = torch.cat([(place + 1)[:, None] * frequencies for place in (patch % grid, patch // grid)], dim=-1)
    angles = F.pad(angles, (0, 0, 0, 1))
    return torch.polar(torch.ones_like(angles), angles)[None, :, None]


class VisionAttention(nn.Module):
    """Attention of all patches of a tile to each other."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=True)
        self.k_proj = nn.Linear(width, width, bias=True)
        self.v_proj = nn.Linear(width, width, bias=True)
        self.o_proj = nn.Linear(width, width, bias=True)

    def forward(self, x_NPC: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        q, k, v = (proj(x_NPC).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotations), rotate(k, rotations), v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    """The feed-forward of a layer."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward. Each reads the normalised residual and adds to it."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        # The eps is 1e-5 in all implementations; norm_eps of the config is read by none.
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, x_NPC: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        x_NPC = x_NPC + self.self_attn(self.input_layernorm(x_NPC), rotations)
        return x_NPC + self.mlp(self.post_attention_layernorm(x_NPC))


class AdapterMLP(nn.Module):
    """Two layers without biases, each with an activation after it."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.dropout = config.projector_dropout
        self.fc1 = nn.Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_output_dim, config.projector_output_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.gelu(self.fc2(x))


class PixelShuffleAdapter(nn.Module):
    """Fewer, wider features: squares of patches are joined, and mapped to the adapter's width."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.side = round(1 / config.pixel_shuffle_ratio)
        self.mlp = AdapterMLP(config)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return self.mlp(pixel_shuffle(x_NPC, self.side))


class PatchEmbedding(nn.Module):
    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        sizes = vision_sizes(config)
        self.patch = sizes.patch
        self.linear = nn.Linear(sizes.channels * sizes.patch**2, config.hidden_size, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.linear(patches_of(pixels, self.patch))


class Layers(nn.Module):
    """Holds the layers under the name `model`, as the weights of Llama 4 have it."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionEncoder(nn.Module):
    """Tiles [N, 3, image_size, image_size] -> features [N, features of a tile, projector_output_dim]."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.config = config
        self.sizes = vision_sizes(config)
        patches, width = self.sizes.grid**2, config.hidden_size
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding_vlm = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.model = Layers(config)
        self.vision_adapter = PixelShuffleAdapter(config)
        # Not a buffer, because loading on the meta device leaves buffers without values.
        self._rotations: torch.Tensor | None = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode tiles. Raises ValueError for tiles of another size than the config's."""
        if tuple(pixels.shape[1:]) != self.sizes.tile:
            raise ValueError(f"tiles have shape {list(pixels.shape[1:])}; this model takes {list(self.sizes.tile)}")
        x_NPC = self.patch_embedding(pixels)
        x_NPC = torch.cat([x_NPC, self.class_embedding.expand(len(x_NPC), 1, -1)], dim=1)
        x_NPC = self.layernorm_pre(x_NPC + self.positional_embedding_vlm)
        rotations = self._rotations_on(x_NPC.device)
        for layer in self.model.layers:
            x_NPC = layer(x_NPC, rotations)
        return self.vision_adapter(self.layernorm_post(x_NPC)[:, :-1])

    def _rotations_on(self, device: torch.device) -> torch.Tensor:
        if self._rotations is None or self._rotations.device != device:
            self._rotations = patch_rotations(self.config).to(device)
        return self._rotations
