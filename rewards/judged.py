"""What the RL stage's judge model found, as the reward. To be weighed with other rewards: see `weighted_sum`."""

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"judged": ["judge"]}  # given by the RL stage's section `judge`, not by the row


def judged(rollout: Rollout, row: Row) -> RewardResult:
    """The judge's expected place among its labels: 0 surely the first, 1 surely the last. The reason is the likeliest.

    Raises ValueError where there was no judge.
    """
    verdict = row.fields.get("judge")
    if verdict is None:
        raise ValueError(f"row {row.id}: no judge has rated the reply; only the RL stage has one (section judge)")
    return RewardResult(float(verdict["score"]), reason=verdict["tag"])
