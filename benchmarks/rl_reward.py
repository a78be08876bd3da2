"""A reward that costs almost nothing and still teaches: every second rollout of a group passes.

It is for measuring the code around the reward.
"""

from posttrain.records import Rollout, Row


def every_second(rollout: Rollout, row: Row) -> float:
    """0 or 1 by the place of the rollout in its group, so that no group has equal rewards only."""
    return float(rollout.index % 2)
