"""Measure how far training moved a model, as KL divergence and entropy on a fixed sample of its data.

The sample holds conversations in which the trained tokens are marked. Before training, the next-token distributions at
these tokens are kept in full. So the KL divergence after training is computed exactly, and not estimated from samples.

Shapes: N measured tokens, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from posttrain.data.stored import pick
from posttrain.model.vision.tiling import PictureTiles
from posttrain.tune.examples import Example
from posttrain.tune.pictures import picture_inputs

T = TypeVar("T")
# At a vocabulary of 200,000 the kept distributions take 0.4 GiB in fp32.
SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Drift:
    """kl: mean over tokens of KL(now || start), nats. entropy_before, entropy_after: means over tokens, nats.

    tokens: how many tokens were measured.
    """

    kl: float
    entropy_before: float
    entropy_after: float
    tokens: int


class DriftProbe:
    """Keeps the distributions of the start model, with which `measure` compares a later model.

    max_tokens: only so many tokens of the sample are measured. tiles: of the sample's pictures.
    """

    def __init__(
        self,
        model: Any,
        sample: Sequence[Example],
        max_tokens: int = SAMPLE_TOKENS,
        *,
        tiles: PictureTiles | None = None,
    ):
        self.sample = sample
        self._tiles = tiles
        self.max_tokens = max_tokens
        self._start_NV = self._log_probs(model)

    def measure(self, model: Any) -> Drift:
        """Compare `model` with the start model on the sample."""
        now_NV = self._log_probs(model)
        kl_N = (now_NV.exp() * (now_NV - self._start_NV)).sum(-1)
        return Drift(float(kl_N.mean()), _entropy(self._start_NV), _entropy(now_NV), len(now_NV))

    @torch.no_grad()
    def _log_probs(self, model: Any) -> torch.Tensor:
        """fp32 log-probabilities [N, V] at the trained tokens. Conversations run one at a time."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        kept: list[torch.Tensor] = []
        left = self.max_tokens
        for example in self.sample:
            if left <= 0:
                break
            ids = torch.tensor([list(example.ids)], device=device)
            targets = torch.tensor(list(example.mask[1:]), device=device, dtype=torch.bool).nonzero()[:left, 0]
            pictures = picture_inputs(self._tiles, [example], device)
            logits = model(input_ids=ids, use_cache=False, **pictures).logits[0, targets]
            kept.append(logits.float().log_softmax(-1).cpu())
            left -= len(targets)
        model.train(was_training)
        return torch.cat(kept)


def drift_sample(data: Sequence[T], seed: int) -> Sequence[T]:
    """Enough items of `data` for a probe, if each has a trained token, drawn with a seed."""
    return pick(data, random.Random(seed).sample(range(len(data)), min(len(data), SAMPLE_TOKENS)))


def _entropy(log_probs_NV: torch.Tensor) -> float:
    return float(-(log_probs_NV.exp() * log_probs_NV).sum(-1).mean())
