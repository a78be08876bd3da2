"""The cheapest reward that teaches: every second rollout of a group passes. To measure what is around it."""

from posttrain.records import Rollout, Row


def every_second(rollout: Rollout, row: Row) -> float:
    """0 or 1, by the rollout's place in its group, so that no group has equal rewards."""
    return float(rollout.index % 2)
