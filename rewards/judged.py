"""The verdict of the RL stage's judge as the reward. To weigh it with other rewards see `weighted_sum`."""

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"judged": ["judge"]}  # the RL stage's section `judge` provides it, not the row


def judged(rollout: Rollout, row: Row) -> RewardResult:
    """The judge's expected place among its labels, in [0, 1]. 0 means certainly the first label, 1 certainly the last.

    The reason is the likeliest label. Raises ValueError if no judge has rated the reply.
    """
    verdict = row.fields.get("judge")
    if verdict is None:
        raise ValueError(f"row {row.id}: no judge has rated the reply; only the RL stage has one (section judge)")
    return RewardResult(float(verdict["score"]), reason=verdict["tag"])
