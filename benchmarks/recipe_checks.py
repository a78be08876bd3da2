"""Verifiers for recipe.py: whether a reply to a puzzle shows its work, or is the answer alone."""

from posttrain.records import Rollout, Row


def worked(rollout: Rollout, row: Row) -> float:
    """1 if there is something before the answer."""
    return float("Answer:" in rollout.text and not rollout.text.lstrip().startswith("Answer:"))


def alone(rollout: Rollout, row: Row) -> float:
    """1 if there is nothing before the answer."""
    return float(rollout.text.lstrip().startswith("Answer:"))
