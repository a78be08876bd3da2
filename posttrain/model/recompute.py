"""Gradient checkpointing, full or selective: which results of a layer's forward the backward computes again.

full keeps a layer's input alone. selective also keeps what is dear to compute and small to hold: the results of matrix
products and of attention; norms, rotary factors, activations and the moving of tokens to experts are computed again.
Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.
"""

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from posttrain.compat.torch import operator_name
from posttrain.config.shared import GradientCheckpointing

_KEPT = frozenset(
    {
        "aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    }
)  # fmt: skip


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator_name(op) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> Any:
    """The `context_fn` of torch.utils.checkpoint.checkpoint for selective checkpointing."""
    return create_selective_checkpoint_contexts(_policy)


def checkpointing_arguments(mode: GradientCheckpointing) -> dict[str, Any] | None:
    """What `gradient_checkpointing_enable` of a transformers model is given; None is its default, which is full."""
    return {"use_reentrant": False, "context_fn": selective_contexts} if mode == "selective" else None
