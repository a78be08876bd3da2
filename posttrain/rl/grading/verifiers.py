"""The reward that replies are scored by: the task's, and beside it the verifier of the system instruction drawn.

Both run in one process, as the reward `by_system`, and the result is (1 - w) R + w V. Left out: verifiers for system
turns that a row brings itself.
"""

from collections.abc import Sequence

from posttrain.config.shared import RewardConfig, SystemsConfig
from posttrain.records import Row
from posttrain.rl.grading.config import GradingConfig, RlJudgeConfig
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.requirements import check_fields

JUDGE_FIELD = "judge"  # of the row that the reward function gets, see judge.py
BY_SYSTEM = "posttrain.rewards.combine:by_system"


def reward_spec(reward: RewardConfig, systems: SystemsConfig) -> RewardSpec:
    """The task's reward; with verifiers, the combination that chooses one by the rollout's system instruction."""
    task = {"name": reward.name, "args": reward.args}
    verifiers = {item.text: item.verifier.model_dump() for item in systems.instructions if item.verifier}
    if not verifiers:
        return RewardSpec(reward.name, reward.args)
    return RewardSpec(BY_SYSTEM, {"reward": task, "verifiers": verifiers})


def reward_config(reward: RewardConfig, systems: SystemsConfig) -> RewardConfig:
    """The reward's section, with what is really called."""
    spec = reward_spec(reward, systems)
    return reward.model_copy(update={"name": spec.name, "args": dict(spec.args)})


def check_rewardable(config: GradingConfig, rows: Sequence[Row]) -> None:
    """Raises DataError for rows that lack a field which the reward, or a verifier that may meet them, needs."""
    own_system = [row for row in rows if row.messages[0].role == "system"]
    others = [row for row in rows if row.messages[0].role != "system"]
    given = given_fields(config.judge)
    check_fields(RewardSpec(config.reward.name, config.reward.args), own_system, given)
    check_fields(reward_spec(config.reward, config.systems), others, given)


def given_fields(judge: RlJudgeConfig | None) -> tuple[str, ...]:
    """Fields that the reward gets beside those of the row."""
    return () if judge is None else (JUDGE_FIELD,)
