"""A tiny multimodal Llama 4 in both implementations, with large random weights, and batches with pictures.

The text part is `test_model.hostile_config`, whose chunks are shorter than a picture's tokens.
"""

import copy

import torch
from test_model import hostile_config
from transformers import Llama4Config, Llama4ForConditionalGeneration

from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

PATCH_ID = 60
FEATURES = 4  # of a tile: 4 by 4 patches, joined 2 by 2
SIDE = 56
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": SIDE,
    "patch_size": 14, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 24, "projector_input_dim": 24,
    "projector_output_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip


def vision_config(text: dict | None = None, **changes) -> Llama4Config:
    text_config = hostile_config(**(text or {})).to_dict()
    ends = {"boi_token_index": 57, "eoi_token_index": 58, "image_token_index": PATCH_ID}
    return Llama4Config(text_config=text_config, vision_config=VISION | changes, pad_token_id=0, **ends)


def vision_pair(scale: float = 0.3, text: dict | None = None):
    """transformers' model and the native one with the same weights, loaded strictly each from the other."""
    config = vision_config(text)
    native = NativeLlama4ForConditionalGeneration(copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in native.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.dim() == 1 and "norm" in name and name.endswith("weight")
            weight.copy_(1 + 0.5 * noise if is_norm else scale * noise)
    theirs = Llama4ForConditionalGeneration(copy.deepcopy(config)).eval()
    theirs.load_state_dict(native.state_dict(), strict=True)
    native.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, native


def document(tiles: list[int], text: int, seed: int) -> torch.Tensor:
    """Token ids: some text, then each picture's <|patch|> tokens between a start and an end, then text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 57, (text,), generator=generator).tolist()
    ids = words[: text // 2]
    for count in tiles:
        ids += [57, *[PATCH_ID] * (FEATURES * count), 58]
    return torch.tensor(ids + words[text // 2 :])


def pixels(tiles: int, seed: int = 3) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 3, SIDE, SIDE, generator=generator) if tiles else None


def batch(rows: list[list[int]], text: int = 9) -> dict[str, torch.Tensor]:
    """Rows padded on the left. rows: the numbers of tiles of each row's pictures."""
    documents = [document(tiles, text + n, n) for n, tiles in enumerate(rows)]
    longest = max(map(len, documents))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document_ids in enumerate(documents):
        ids[row, longest - len(document_ids) :] = document_ids
        mask[row, longest - len(document_ids) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    tiles = pixels(sum(map(sum, rows)))
    return inputs if tiles is None else {**inputs, "pixel_values": tiles}
