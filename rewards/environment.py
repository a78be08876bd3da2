"""The reward of stages whose every row is an episode: the environment gives it, so this one is never asked."""

from posttrain.records import RewardResult, Rollout, Row


def of_environment(rollout: Rollout, row: Row) -> RewardResult:
    """The reward that the environment of an episode gave it. Other rows need another reward."""
    if rollout.scored is None or rollout.scored.result is None:
        raise ValueError(f"row {row.id} ({row.capability}) has no environment; name a reward for it")
    return rollout.scored.result
