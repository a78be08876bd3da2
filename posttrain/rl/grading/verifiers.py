"""The reward that replies are scored by: the task's, and beside it the verifier of the system instruction drawn.

Both run in one process, as the reward `by_system`, and the result is (1 - w) R + w V. Left out: verifiers for system
turns that a row brings itself.
"""

from collections.abc import Sequence

from posttrain.config.shared import RewardConfig
from posttrain.records import Row
from posttrain.rl.config import RlConfig
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.requirements import check_fields

JUDGE_FIELD = "judge"  # of the row that the reward function gets, see judge.py
BY_SYSTEM = "posttrain.rewards.combine:by_system"


def reward_spec(config: RlConfig) -> RewardSpec:
    """The task's reward; with verifiers, the combination that chooses one by the rollout's system instruction."""
    task = {"name": config.reward.name, "args": config.reward.args}
    verifiers = {item.text: item.verifier.model_dump() for item in config.systems.instructions if item.verifier}
    if not verifiers:
        return RewardSpec(config.reward.name, config.reward.args)
    return RewardSpec(BY_SYSTEM, {"reward": task, "verifiers": verifiers})


def reward_config(config: RlConfig) -> RewardConfig:
    """The reward's section, with what is really called."""
    spec = reward_spec(config)
    return config.reward.model_copy(update={"name": spec.name, "args": dict(spec.args)})


def check_rewardable(config: RlConfig, rows: Sequence[Row]) -> None:
    """Raises DataError for rows that lack a field which the reward, or a verifier that may meet them, needs."""
    own_system = [row for row in rows if row.messages[0].role == "system"]
    given = given_fields(config)
    check_fields(RewardSpec(config.reward.name, config.reward.args), own_system, given)
    check_fields(reward_spec(config), [row for row in rows if row.messages[0].role != "system"], given)


def given_fields(config: RlConfig) -> tuple[str, ...]:
    """Fields that the reward gets beside those of the row."""
    return () if config.judge is None else (JUDGE_FIELD,)
