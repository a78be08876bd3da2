"""The quick start's model: a Llama 4 text model of under a million parameters, with its first weights."""

import math
from typing import Any

import torch

from posttrain.base.config import ModelSizes

# Far above the length of any puzzle, so that chunks and attention temperature never have an effect. Engines treat both
# differently at the limits.
_MAX_LENGTH = 2048
_EMBEDDING_STD = 1.0
_HEAD_STD = 0.02


def build_model(sizes: ModelSizes, tokenizer: Any, balance_coefficient: float, *, seed: int) -> Any:
    """A `NativeLlama4ForCausalLM` in fp32. Its first weights depend on the sizes and the seed alone."""
    from posttrain.model.native import NativeLlama4ForCausalLM

    model = NativeLlama4ForCausalLM(text_config(sizes, tokenizer, balance_coefficient))
    initialize(model, sizes.layers, seed)
    return model


def text_config(sizes: ModelSizes, tokenizer: Any, balance_coefficient: float) -> Any:
    """The config of a Llama 4 text model, a `Llama4TextConfig`."""
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size_mlp=sizes.ffn,
        intermediate_size=sizes.expert_ffn,
        num_local_experts=sizes.experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=_MAX_LENGTH,
        max_position_embeddings=_MAX_LENGTH,
        attn_temperature_tuning=False,
        floor_scale=_MAX_LENGTH,
        router_aux_loss_coef=balance_coefficient,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


@torch.no_grad()
def initialize(model: torch.nn.Module, layers: int, seed: int) -> None:
    """Draw weights from a normal distribution with the standard deviation 1 / sqrt(fan-in).

    It is smaller for projections into the residual stream and for the head. Embeddings have a standard deviation of 1,
    so that they are as large as the values that the layers add to them. With the usual 0.02 the layers' values would
    hide which token it is: the loss after 250 steps was 0.65 instead of 0.47.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        fan_in = parameter.shape[-2] if "experts." in name else parameter.shape[-1]
        std = fan_in**-0.5
        if "embed_tokens" in name:
            std = _EMBEDDING_STD
        elif "lm_head" in name:
            std = _HEAD_STD
        elif "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * layers)
        parameter.normal_(0.0, std, generator=generator)
