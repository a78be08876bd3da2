"""Bytes that a forward of the native Llama 4 keeps for its backward, and bytes of a KV cache. Arithmetic, no torch.

They are counted per token, tensor by tensor in the order of `posttrain/model`. Left out: indices of 8 bytes a token,
workspaces inside kernels, rows longer than a chunk, and the exchange buffers of expert parallelism.

Names: D hidden size, Q and K widths of queries and keys, I expert width, V vocabulary, b bytes of an element.
"""

from typing import Any

from posttrain.config.training import GradientCheckpointing
from posttrain.planning.memory import BYTES, FP32


def saved_bytes(config: Any, tokens: int, dtype: str, *, checkpointing: GradientCheckpointing) -> int:
    """Bytes saved at the end of a forward with labels, by the layers and by the head.

    tokens: number of tokens of the forward. dtype: of the model.
    """
    # The final norm, and the log-probabilities of the loss in fp32.
    head = 8 * config.hidden_size + FP32 * config.vocab_size
    return tokens * (_kept_bytes(config, dtype, checkpointing) + head)


def peak_bytes(config: Any, tokens: int, dtype: str, *, checkpointing: GradientCheckpointing) -> int:
    """Largest number of bytes alive at once in forward and backward, besides weights and gradients.

    At the loss these are the saved bytes, the logits, and their gradient twice in fp32 (of the loss and of the
    log-softmax). With checkpointing a layer is computed again later, when the memory of the head is free.
    """
    at_loss = tokens * (BYTES[dtype] + 2 * FP32) * config.vocab_size
    saved = saved_bytes(config, tokens, dtype, checkpointing=checkpointing)
    if checkpointing == "none":
        return saved + at_loss
    largest = max(layer_bytes(config, index, dtype) for index in range(config.num_hidden_layers))
    return max(saved + at_loss, tokens * (_kept_bytes(config, dtype, checkpointing) + largest))


def _kept_bytes(config: Any, dtype: str, checkpointing: GradientCheckpointing) -> int:
    """Bytes that all layers keep for a token.

    Without checkpointing they keep everything, with `full` their inputs, with `selective` their inputs and the results
    of matrix products and attention.
    """
    layers = range(config.num_hidden_layers)
    if checkpointing == "none":
        return sum(layer_bytes(config, index, dtype) for index in layers)
    inputs = BYTES[dtype] * config.hidden_size * len(layers)
    return inputs + (sum(product_bytes(config, i, dtype) for i in layers) if checkpointing == "selective" else 0)


def product_bytes(config: Any, index: int, dtype: str) -> int:
    """Bytes of a token in the results of one layer's matrix products and attention."""
    b, hidden = BYTES[dtype], config.hidden_size
    query, key = _widths(config)
    attention = b * (2 * query + 2 * key + hidden) + FP32 * config.num_attention_heads
    if index not in config.moe_layers:
        return attention + b * (2 * config.intermediate_size_mlp + hidden)
    experts = (1 + config.num_experts_per_tok) * b * (2 * config.intermediate_size + hidden)
    return attention + experts + FP32 * config.num_local_experts


def _widths(config: Any) -> tuple[int, int]:
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def layer_bytes(config: Any, index: int, dtype: str) -> int:
    """Bytes that one layer saves for a token."""
    b, hidden = BYTES[dtype], config.hidden_size
    query, key = _widths(config)
    # Two norms of 8 bytes a channel. fp32 keeps the unit vector and the output, bf16 also an fp32 copy of the input.
    norms = 2 * 8 * hidden
    attention = b * (2 * query + 2 * key) + FP32 * config.num_attention_heads
    if config.use_qk_norm and config.no_rope_layers[index] and dtype != "float32":
        attention += FP32 * (query + key)  # the norm's fp32 copy
    if index not in config.moe_layers:
        return norms + attention + 3 * b * config.intermediate_size_mlp
    chosen = config.num_experts_per_tok
    shared = 3 * b * config.intermediate_size
    # The scored rows; with several experts a token also the rows before they are scored.
    rows = b * hidden * (1 if chosen == 1 else 2)
    routed = chosen * (rows + 3 * b * config.intermediate_size)
    router = 0 if dtype == "float32" else FP32 * hidden
    return norms + attention + shared + routed + router


def kv_bytes(config: Any, sequences: int, length: int, *, dtype: str) -> int:
    """Bytes of transformers' `DynamicCache` for `sequences` sequences of `length` tokens.

    A chunked layer keeps at most one chunk.
    """
    chunked = config.attention_chunk_size or length
    kinds = config.layer_types
    tokens = sum(min(length, chunked) if kind == "chunked_attention" else length for kind in kinds)
    return 2 * sequences * tokens * config.num_key_value_heads * config.head_dim * BYTES[dtype]
