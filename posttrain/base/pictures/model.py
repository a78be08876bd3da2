"""The model for puzzles about pictures: a multimodal Llama 4 of a million parameters, with its processor.

Its text model is that of the quick start. A picture is one tile of 42 x 42 pixels, of which each cell of 14 x 14
becomes one feature.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.base.config import ModelSizes
from posttrain.base.model import initialize, text_config
from posttrain.base.pictures.drawing import CELL, SIDE
from posttrain.base.pictures.tokenizer import CHAT_TEMPLATE, MAX_TILES, picture_rule
from posttrain.base.problem import Picture

_PATCH = CELL // 2
_RATIO = 0.5  # two by two patches become one feature
_WIDTH, _LAYERS, _HEADS = 64, 2, 2
_POSITION_STD = 0.3
_PROJECTOR_SCALE = 0.5  # features are then about as large as the embeddings of tokens


def build_vision_model(sizes: ModelSizes, tokenizer: Any, balance_coefficient: float, *, seed: int) -> Any:
    """A `NativeLlama4ForConditionalGeneration` in fp32. Its first weights depend on the sizes and the seed alone."""
    from transformers import Llama4Config

    from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

    text = text_config(sizes, tokenizer, balance_coefficient)
    vision = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "intermediate_size": int(_WIDTH / _RATIO**2),
        "image_size": SIDE,
        "patch_size": _PATCH,
        "pixel_shuffle_ratio": _RATIO,
        "vision_output_dim": sizes.hidden,
        "projector_input_dim": sizes.hidden,
        "projector_output_dim": sizes.hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    rule = picture_rule(tokenizer)
    ends = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Llama4Config(
        text_config=text.to_dict(),
        vision_config=vision,
        boi_token_index=rule.start,
        eoi_token_index=rule.end,
        image_token_index=rule.patch,
        dtype="float32",
        **ends,
    )
    model = NativeLlama4ForConditionalGeneration(config)
    initialize(model.language_model, sizes.layers, seed)
    _initialize_vision(model, seed)
    return model


def save_processor(tokenizer: Any, folder: Path) -> None:
    """Write the files by which transformers and vLLM cut pictures into tiles."""
    from transformers import Llama4ImageProcessor, Llama4Processor

    images = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=MAX_TILES)
    processor = Llama4Processor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=_PATCH,
        pixel_shuffle_ratio=_RATIO,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


def tiles_of(pictures: list[Picture]) -> torch.Tensor:
    """Tiles [N, 3, SIDE, SIDE] of pictures that are one tile each, as the processor makes and rounds them."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    shares = (pixels * (1 / 255)).bfloat16().float()  # the processor rounds before it centres, and after it
    return ((shares - 0.5) / 0.5).bfloat16().float()


@torch.no_grad()
def _initialize_vision(model: torch.nn.Module, seed: int) -> None:
    """As the text model's: standard deviation 1 / sqrt(fan-in), less into the residual stream; biases start at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("language_model"):
            continue
        if name.endswith(("class_embedding", "positional_embedding_vlm")):
            parameter.normal_(0.0, _POSITION_STD, generator=generator)
        elif parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "mlp.fc2.weight")) and "vision_adapter" not in name:
                std /= math.sqrt(2 * _LAYERS)
            elif "vision_adapter" in name:
                std *= 2.0  # its activations halve what they pass on
            elif "multi_modal_projector" in name:
                std *= _PROJECTOR_SCALE
            parameter.normal_(0.0, std, generator=generator)
