"""Advantages from rewards: of one group, `(rewards_G) -> advantages_G`; where a rule needs it, then of the batch."""

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

STD_FLOOR = 1e-6


def group_mean(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - mean(R). No division by the deviation, so easy and hard prompts are not blown up.

    Source: Dr. GRPO, arXiv 2503.20783.
    """
    mean = fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def grpo(rewards_G: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-6), with the deviation of the group itself.

    Source: GRPO, arXiv 2402.03300.
    """
    mean, deviation = fmean(rewards_G), pstdev(rewards_G)
    return [(reward - mean) / (deviation + STD_FLOOR) for reward in rewards_G]


def rloo(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - mean of the others' rewards. Needs two rewards at least.

    Source: RLOO, arXiv 2402.14740.
    """
    total, others = sum(rewards_G), len(rewards_G) - 1
    return [reward - (total - reward) / others for reward in rewards_G]


ADVANTAGES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "group_mean": group_mean,
    "grpo": grpo,
    "rloo": rloo,
    "batch_norm": group_mean,
}


def batch_norm(advantages_N: Sequence[float]) -> list[float]:
    """A_i / (std(A) + 1e-6), with the deviation of the N centred rewards of the whole batch.

    One scale for all groups: a group whose rewards hardly differ is not blown up, as a deviation of its own would.

    Source: REINFORCE++ with baseline, arXiv 2501.03262.
    """
    deviation = pstdev(advantages_N)
    return [advantage / (deviation + STD_FLOOR) for advantage in advantages_N]


# What is done to the advantages of a whole batch, for the names of ADVANTAGES that need it.
OVER_BATCH: dict[str, Callable[[Sequence[float]], list[float]]] = {"batch_norm": batch_norm}


def is_zero(advantages_G: Sequence[float]) -> bool:
    """True when the group teaches nothing: every advantage is zero up to rounding."""
    return all(abs(advantage) < 1e-9 for advantage in advantages_G)
