"""Gradient checkpointing, full or selective: which results of a layer's forward the backward computes again.

Full checkpointing keeps only a layer's input. Selective checkpointing also keeps results that take long to compute but
little memory: those of matrix products and of attention. Norms, rotary factors, activations and the moving of tokens to
experts are computed again.
Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.
"""

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from posttrain.compat.torch import operator_name
from posttrain.config.training import GradientCheckpointing

_KEPT = frozenset(
    {
        "aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    }
)  # fmt: skip


def _policy(context: Any, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator_name(op) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> Any:
    """The `context_fn` of torch.utils.checkpoint.checkpoint for selective checkpointing."""
    return create_selective_checkpoint_contexts(_policy)


def checkpointing_arguments(mode: GradientCheckpointing) -> dict[str, Any] | None:
    """The argument of a model's `gradient_checkpointing_enable`; None, its default, is full checkpointing."""
    return {"use_reentrant": False, "context_fn": selective_contexts} if mode == "selective" else None
