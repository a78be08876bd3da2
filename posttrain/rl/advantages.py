"""Advantages from rewards.

A rule is a function from the rewards of one group to its advantages, `(rewards_G) -> advantages_G`. Some rules have a
second function, which is applied to the advantages of a whole batch.
"""

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

STD_FLOOR = 1e-6


def group_mean(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - mean(R). Example: rewards 1, 0, 0, 1 give 0.5, -0.5, -0.5, 0.5.

    There is no division by the standard deviation, which would give groups of very easy and very hard prompts more
    weight, since their rewards hardly differ.


    Source: Dr. GRPO, arXiv 2503.20783.
    """
    mean = fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def grpo(rewards_G: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-6), with the standard deviation of the group.

    Source: GRPO, arXiv 2402.03300.
    """
    mean, deviation = fmean(rewards_G), pstdev(rewards_G)
    return [(reward - mean) / (deviation + STD_FLOOR) for reward in rewards_G]


def rloo(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - mean of the other rewards of the group, which must have at least two.

    Source: RLOO, arXiv 2402.14740.
    """
    total, others = sum(rewards_G), len(rewards_G) - 1
    return [reward - (total - reward) / others for reward in rewards_G]


Rule = Callable[[Sequence[float]], list[float]]


def of_turns(rule: Rule, rewards_G: Sequence[float], paid_GT: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """The advantage of each turn: that of what its rollout gets from this turn on, by the same rule over the group.

    rewards_G: of whole rollouts. paid_GT: the part of them that was paid for each turn of each rollout; the rest is
    for the whole rollout. For turn t, the rule gets the rewards without what was paid for earlier turns. So the first
    turn has the advantage of the rollout, and a later turn gets no credit for what was earned before it.

    Example: of two rollouts by `group_mean`, one was paid 0.5 for its first turn and has a reward of 1.5, the other was
    paid 0.25 for its second and has 0.25. The first turns have 1.5 and 0.25, so 0.625 and -0.625; the second turns have
    1 and 0.25, so 0.375 and -0.375.

    Source: the reward to go of the policy gradient theorem, with the baseline of the rule.
    """
    left, turns_TG = list(rewards_G), []
    for turn in range(max(map(len, paid_GT), default=0)):
        turns_TG.append(rule(left))
        left = [value - (paid[turn] if turn < len(paid) else 0.0) for value, paid in zip(left, paid_GT, strict=True)]
    return [tuple(turns_TG[turn][place] for turn in range(len(paid))) for place, paid in enumerate(paid_GT)]


ADVANTAGES: dict[str, Rule] = {
    "group_mean": group_mean,
    "grpo": grpo,
    "rloo": rloo,
    "batch_norm": group_mean,
}


def batch_norm(advantages_N: Sequence[float]) -> list[float]:
    """A_i / (std(A) + 1e-6), with the standard deviation of the N advantages of the whole batch.

    advantages_N: from `group_mean`. All groups are divided by the same number, so a group whose rewards hardly differ
    does not get more weight, as it would from its own standard deviation.

    Source: REINFORCE++ with baseline, arXiv 2501.03262.
    """
    deviation = pstdev(advantages_N)
    return [advantage / (deviation + STD_FLOOR) for advantage in advantages_N]


# For the names in ADVANTAGES that have a second function: it is applied to the advantages of a whole batch.
OVER_BATCH: dict[str, Rule] = {"batch_norm": batch_norm}


def is_zero(advantages_G: Sequence[float]) -> bool:
    """True if every advantage is zero up to rounding, so that the group teaches nothing."""
    return all(abs(advantage) < 1e-9 for advantage in advantages_G)
