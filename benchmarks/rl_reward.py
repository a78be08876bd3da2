"""The cheapest reward that teaches: every second rollout of a group passes. For benchmarks that measure what is around."""

from posttrain.records import Rollout, Row


def every_second(rollout: Rollout, row: Row) -> float:
    """0 or 1, by the rollout's place in its group, so that no group has equal rewards."""
    return float(rollout.index % 2)
