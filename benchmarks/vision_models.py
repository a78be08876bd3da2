"""A small multimodal Llama 4 with random weights, tokenizer and processor, and drawn pictures; for tests, too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from posttrain.base.pictures.tokenizer import CHAT_TEMPLATE, with_picture_tokens
from posttrain.base.tokenizer import build_tokenizer, save_tokenizer

SIDE = 56  # of a tile; it has 4 features


def image_tokenizer() -> Any:
    """The quick start's tokenizer with the tokens that stand for pictures, and a template for content parts."""
    return with_picture_tokens(build_tokenizer())


@dataclass(frozen=True)
class Sizes:
    """Of the text model and of the vision encoder, whose features are as wide. The tests take the smallest that run."""

    hidden: int = 32
    layers: int = 4
    vision_hidden: int = 32
    vision_layers: int = 1
    side: int = SIDE


def save_vision_policy(folder: Path, seed: int = 0, *, sizes: Sizes | None = None) -> Path:
    """Write the folder: random weights that tell replies apart, sizes that vLLM runs on a CPU."""
    of = sizes or Sizes()
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

    tokenizer = image_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": of.hidden, "num_hidden_layers": of.layers,
        "num_attention_heads": of.hidden // 16,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": of.hidden,
        "intermediate_size_mlp": 2 * of.hidden,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "no_rope_layers": [*[1] * (of.layers - 1), 0], "attention_chunk_size": 1024, "max_position_embeddings": 1024,
        "attn_temperature_tuning": False, "floor_scale": 1024, "router_aux_loss_coef": 0.0, "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": of.vision_hidden, "num_hidden_layers": of.vision_layers,
        "num_attention_heads": of.vision_hidden // 32, "intermediate_size": 4 * of.vision_hidden,
        "image_size": of.side, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "vision_output_dim": of.vision_hidden,
        "projector_input_dim": of.vision_hidden, "projector_output_dim": of.vision_hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in {
        "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>", "image_token_index": "<|patch|>",
    }.items()}  # fmt: skip
    ends = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    model = NativeLlama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config=vision, **ids, **ends, dtype="float32")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision" in name or "projector" in name:
                weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    images = Llama4ImageProcessor(size={"height": of.side, "width": of.side}, max_patches=4)
    Llama4Processor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def draw(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> str:
    """Draw a picture with a few boxes and return its name."""
    image = Image.new("RGB", size, (200, 200, 190))
    brush = ImageDraw.Draw(image)
    for box in range(3):
        x, y = (37 * seed + 17 * box) % (size[0] - 16), (23 * seed + 29 * box) % (size[1] - 16)
        brush.rectangle((x, y, x + 14, y + 12), fill=((90 * seed + 60 * box) % 256, (40 * seed) % 256, 80 * box))
    image.save(path)
    return path.name
