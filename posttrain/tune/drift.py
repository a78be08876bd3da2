"""How far training moved a model: "light" as two figures on a fixed sample.

The sample is a set of conversations with the tokens that are trained on. Before training the full next-token
distributions at those tokens are kept; after it, the KL divergence from them is exact, not sampled.

Shapes: N measured tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# At a vocabulary of 200,000 the kept distributions take 0.4 GiB in fp32.
SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation; `mask` is 1 on the tokens that are trained on."""

    ids: Sequence[int]
    mask: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drift:
    """kl: mean over tokens of KL(now || start), nats; entropy_before, entropy_after: mean, nats; tokens: how many."""

    kl: float
    entropy_before: float
    entropy_after: float
    tokens: int


class DriftProbe:
    """Made from the start model; `measure` compares a later one with it."""

    def __init__(self, model: Any, sample: Sequence[Example], max_tokens: int = SAMPLE_TOKENS):
        self.sample = sample
        self.max_tokens = max_tokens
        self._start_NV = self._log_probs(model)

    def measure(self, model: Any) -> Drift:
        """Compare `model` with the start model on the sample."""
        now_NV = self._log_probs(model)
        kl_N = (now_NV.exp() * (now_NV - self._start_NV)).sum(-1)
        return Drift(float(kl_N.mean()), _entropy(self._start_NV), _entropy(now_NV), len(now_NV))

    @torch.no_grad()
    def _log_probs(self, model: Any) -> torch.Tensor:
        """fp32 log-probabilities [N, V] at the tokens trained on, one conversation at a time."""
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
            logits = model(input_ids=ids, use_cache=False).logits[0, targets]
            kept.append(logits.float().log_softmax(-1).cpu())
            left -= len(targets)
        model.train(was_training)
        return torch.cat(kept)


def _entropy(log_probs_NV: torch.Tensor) -> float:
    return float(-(log_probs_NV.exp() * log_probs_NV).sum(-1).mean())
