"""The losses on the routers of a mixture of experts, and the figures on them for metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posttrain.model.moe import Routing


@dataclass(frozen=True, slots=True)
class RouterStats:
    """Figures on the routing of one forward, with one entry for each MoE layer, without gradient.

    load_LE: fraction of expert choices that went to each expert. entropy_L: mean entropy of softmax(logits), in nats.
    dead_L: the number of experts that no token went to, int64.
    """

    load_LE: torch.Tensor
    entropy_L: torch.Tensor

    @property
    def dead_L(self) -> torch.Tensor:
        return (self.load_LE == 0).sum(-1)


@dataclass(frozen=True, slots=True)
class RouterLossWeights:
    """The factors by which the losses on routers are multiplied before they are added to the loss."""

    balance: float = 0.0
    z: float = 0.0


def expert_counts(expert_ids_TK: torch.Tensor, num_experts: int, weights_T: torch.Tensor | None = None) -> torch.Tensor:
    """How many choices went to each expert, fp64 [E]. weights_T: how many tokens each stands for; 0 for padding."""
    choices_TK = None if weights_T is None else weights_T[:, None].expand(expert_ids_TK.shape).flatten().double()
    return torch.bincount(expert_ids_TK.flatten(), choices_TK, minlength=num_experts).double()


def expert_load(expert_ids_TK: torch.Tensor, num_experts: int, weights_T: torch.Tensor | None = None) -> torch.Tensor:
    """Fraction of the choices that went to each expert, fp32 [E]; arguments as above."""
    counts = expert_counts(expert_ids_TK, num_experts, weights_T)
    return (counts / counts.sum().clamp(min=1)).float()


def _mean(values: torch.Tensor, weights_T: torch.Tensor | None) -> torch.Tensor:
    """The mean over tokens of values [T, ...]."""
    if weights_T is None:
        return values.mean(0)
    return torch.tensordot(weights_T.to(values.dtype), values, 1) / weights_T.sum()


def load_balance_loss(
    routings: Sequence[Routing], weights_T: torch.Tensor | None = None, load_LE: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over layers of E * sum_e load_e * mean probability_e: 1 when balanced, up to E when one expert has all.

    Args:
        routings: one for each MoE layer.
        weights_T: how many tokens each token counts as: 0 for padding, and in a packed tree the number of documents
            that it belongs to. None: 1 each.
        load_LE: loads to use instead of the loads of these tokens. A training gives those of its last step. Then the
            loss is a mean over tokens, so it does not depend on how a step is split into forwards.
    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6, with the load taken over all K choices.
    """
    losses = []
    for index, routing in enumerate(routings):
        logits, ids = routing.logits_TE, routing.expert_ids_TK
        load_E = expert_load(ids, logits.shape[-1], weights_T) if load_LE is None else load_LE[index]
        losses.append(logits.shape[-1] * (load_E * _mean(logits.softmax(-1), weights_T)).sum())
    return torch.stack(losses).mean()


def z_loss(routings: Sequence[Routing], weights_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2, which keeps router logits small; arguments as above.

    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    return torch.stack([_mean(r.logits_TE.logsumexp(-1).square(), weights_T) for r in routings]).mean()


@torch.no_grad()
def router_stats(routings: Sequence[Routing], weights_T: torch.Tensor | None = None) -> RouterStats:
    """The figures for metrics. The arguments are those of `load_balance_loss`."""
    loads, entropies = [], []
    for routing in routings:
        log_probs = routing.logits_TE.log_softmax(-1)
        loads.append(expert_load(routing.expert_ids_TK, log_probs.shape[-1], weights_T))
        entropies.append(_mean(-(log_probs.exp() * log_probs).sum(-1), weights_T))
    return RouterStats(torch.stack(loads), torch.stack(entropies))
