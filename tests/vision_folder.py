"""One tiny multimodal Llama 4 as a whole folder, with tokenizer and processor, for stages and engines; and rows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from posttrain.base.tokenizer import build_tokenizer, save_tokenizer
from posttrain.data.images.tiles import TOKENS

SIDE = 56  # of a tile; it has 4 features
TEMPLATE = """{{- bos_token }}
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{ '<|image|>' }}
            {%- else -%}{{ part['text'] }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}{%- generation %}{{- content_of(message) + '<|eot|>' }}{%- endgeneration %}
    {%- else %}{{- content_of(message) + '<|eot|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}
"""


def image_tokenizer() -> Any:
    """The quick start's tokenizer with the tokens that stand for pictures, and a template for content parts."""
    from tokenizers import AddedToken

    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_vision_policy(folder: Path, seed: int = 0) -> Path:
    """Write the folder: random weights that tell replies apart, sizes that vLLM runs on a CPU."""
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

    tokenizer = image_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 32, "intermediate_size_mlp": 64,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 1024, "max_position_embeddings": 1024,
        "attn_temperature_tuning": False, "floor_scale": 1024, "router_aux_loss_coef": 0.0, "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128,
        "image_size": SIDE, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 32,
        "projector_input_dim": 32, "projector_output_dim": 32,
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
    images = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=4)
    Llama4Processor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=TEMPLATE
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


def write_picture_rows(folder: Path, count: int, *, answers: bool = True) -> Path:
    """Rows with 0, 1, 2 or 3 pictures of one tile or several, and a file of a text row's form. Returns the file.

    answers: supervised rows; otherwise prompts with the field `answer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, SIDE)]
    rows = []
    for index in range(count):
        names = [draw(folder / f"{index}_{n}.png", 5 * index + n, sizes[(index + n) % 3]) for n in range(index % 4)]
        parts: list[dict[str, str]] = [{"type": "image", "image": name} for name in names]
        text = f"Sum: {index % 9} + {len(names)}"
        content = [*parts, {"type": "text", "text": text}] if parts else text
        answer = str(index % 9 + len(names))
        turns = [{"role": "user", "content": content}]
        if answers:
            rows.append(
                {"id": f"r{index}", "messages": [*turns, {"role": "assistant", "content": f"Answer: {answer}"}]}
            )
        else:
            rows.append({"id": f"r{index}", "messages": turns, "answer": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_picture_pairs(folder: Path, numbers: Iterable[int]) -> Path:
    """Preference pairs of these numbers, which show 0, 1 or 2 pictures: number % 3. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in numbers:
        names = [draw(folder / f"{index}_{n}.png", index + 3 * n, ((1 + n) * SIDE, SIDE)) for n in range(index % 3)]
        answer = index % 9 + len(names)
        rows.append(
            {
                "id": f"p{index}",
                "prompt": "<image>" * len(names) + f"Sum: {index % 9} + {len(names)}",
                "chosen": "So. " * (index % 4) + f"Answer: {answer}",
                "rejected": f"Answer: {answer + 1}",
                **({"images": names} if names else {}),
            }
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REWARD = '''
from posttrain import load_image

def even_share(rollout, row):
    """Share of even token ids, with the width of the pictures, which is read when it is asked for."""
    ids = rollout.token_ids
    width = sum(load_image(reference).width for reference in rollout.prompt.pictures)
    assert bool(width) == ("has pictures" in row.messages[-1].text)
    return sum(token % 2 == 0 for token in ids) / len(ids) + 1e-3 * (sum(token * token for token in ids) % 997) / 997
'''
