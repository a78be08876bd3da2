"""The one rule that says whether a reply is right, from the profile to the evaluation and the report."""

from collections.abc import Sequence


def is_right(reward: float, threshold: float) -> bool:
    """Whether a reply with this reward counts as right. threshold: the stage's `reward.correct_threshold`.

    A reward that equals the threshold is right: with 0.5, a program that passes half of its tests counts as right.
    """
    return reward >= threshold


def passes_and_failures(rewards: Sequence[float | None], threshold: float) -> tuple[int, int]:
    """How many of the scored replies are right, and how many are not. rewards: None for one without a score."""
    known = [reward for reward in rewards if reward is not None]
    passes = sum(is_right(reward, threshold) for reward in known)
    return passes, len(known) - passes
