"""Check, before training, that the model keeps packed conversations apart.

A model may let attention pass between the conversations of a row, or not restart positions. It raises no error then,
and the loss looks healthy. So two conversations are run alone and then packed into one row, and their log-probabilities
are compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.model.vision.tiling import PictureTiles
from posttrain.tune.examples import Example
from posttrain.tune.pictures import picture_inputs

# Far above differences by rounding, and far below those of a leak (5.5 for transformers' Llama 4 with a cache).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def packing_difference(model: Any, examples: Sequence[Example], tiles: PictureTiles | None = None) -> float:
    """The mean over tokens of the absolute difference in log-probability, packed against alone, in nats.

    tiles: of the examples' pictures.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    alone = [
        _log_probs(
            model, torch.tensor([list(item.ids)], device=device), None, pictures=picture_inputs(tiles, [item], device)
        )
        for item in examples
    ]
    ids = torch.tensor([[token for item in examples for token in item.ids]], device=device)
    positions = torch.tensor([[at for item in examples for at in range(len(item.ids))]], device=device)
    packed = _log_probs(model, ids, positions, pictures=picture_inputs(tiles, examples, device))
    model.train(was_training)
    differences, start = [], 0
    for item, own in zip(examples, alone, strict=True):
        differences.append((packed[start : start + len(item.ids) - 1] - own).abs())
        start += len(item.ids)
    return float(torch.cat(differences).mean())


def require_isolation(model: Any, examples: Sequence[Example], tiles: PictureTiles | None = None) -> float:
    """Raise `ConfigError` if packing changes the log-probabilities of a conversation. Returns the mean difference.

    The first and the longest example are compared, and one with a picture if there is any. tiles: of the pictures.
    """
    longest = max(examples, key=lambda item: len(item.ids))
    shows = [item for item in examples if item.pictures][:1]
    difference = packing_difference(model, [examples[0], longest, *shows], tiles)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    if difference > tolerance:
        raise ConfigError(
            "packing",
            [
                f"got true: {type(model).__name__} lets packed conversations see each other or does not restart "
                f"their positions (log-probabilities differ by {difference:.2g}, tolerance {tolerance}); set packing: "
                "false and batch_size, or model.implementation: native"
            ],
        )
    return difference


def _log_probs(
    model: Any, ids: torch.Tensor, positions: torch.Tensor | None, *, pictures: Mapping[str, Any]
) -> torch.Tensor:
    """fp32 log-probability of each next token, [S - 1]."""
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **pictures).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
