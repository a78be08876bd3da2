"""Packing must not change what a conversation is: checked on the model itself before it is trained.

Two documents are run alone and then side by side. Where attention leaks between them, or positions do not restart,
their log-probabilities differ, silently: no error is raised and the loss looks healthy.
"""

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.tune.drift import Example

# Far above rounding, far below a leak (5.5 was measured for transformers' Llama 4 with a cache).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def packing_difference(model: Any, examples: Sequence[Example]) -> float:
    """Mean over tokens of the difference in log-probability between documents packed and documents alone."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    alone = [_log_probs(model, torch.tensor([list(item.ids)], device=device), None) for item in examples]
    ids = torch.tensor([[token for item in examples for token in item.ids]], device=device)
    positions = torch.tensor([[at for item in examples for at in range(len(item.ids))]], device=device)
    packed = _log_probs(model, ids, positions)
    model.train(was_training)
    differences, start = [], 0
    for item, own in zip(examples, alone, strict=True):
        differences.append((packed[start : start + len(item.ids) - 1] - own).abs())
        start += len(item.ids)
    return float(torch.cat(differences).mean())


def require_isolation(model: Any, examples: Sequence[Example]) -> float:
    """Raise `ConfigError` unless packed documents get what they get alone. Returns the difference found."""
    longest = max(examples, key=lambda item: len(item.ids))
    difference = packing_difference(model, [examples[0], longest])
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    if difference > tolerance:
        raise ConfigError(
            "packing",
            [
                f"got true: {type(model).__name__} lets packed conversations see each other or counts their positions "
                f"through (log-probabilities move by {difference:.2g}, tolerance {tolerance}); set packing: false and "
                "batch_size, or model.implementation: native"
            ],
        )
    return difference


def _log_probs(model: Any, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """fp32 log-probability of each next token, [S - 1]."""
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
