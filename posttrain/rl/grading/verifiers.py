"""The reward that scores replies: that of the task, combined with the verifier of the drawn system instruction.

Both run in one process, as the reward `by_system`. The result is (1 - w) R + w V, where R is the reward of the task, V
the result of the verifier and w the verifier's weight. Left out: verifiers for system turns that are part of a row.
"""

from collections.abc import Sequence

from posttrain.config.rewards import RewardConfig, SystemsConfig
from posttrain.episodes.tools import check_environment_rows
from posttrain.errors import ConfigError
from posttrain.records import Row
from posttrain.rl.grading.config import GradingConfig, RlJudgeConfig
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.requirements import check_fields

JUDGE_FIELD = "judge"  # of the row that the reward function gets, see judge.py
BY_SYSTEM = "posttrain.rewards.combine:by_system"


def reward_spec(reward: RewardConfig, systems: SystemsConfig) -> RewardSpec:
    """The reward of the task; if there are verifiers, `by_system`, which chooses one by the rollout's instruction."""
    task = {"name": reward.name, "args": reward.args}
    verifiers = {item.text: item.verifier.model_dump() for item in systems.instructions if item.verifier}
    if not verifiers:
        return RewardSpec(reward.name, reward.args, reward.python or "")
    if reward.python:
        raise ConfigError("reward", ["python: a reward in another interpreter cannot be combined with verifiers"])
    return RewardSpec(BY_SYSTEM, {"reward": task, "verifiers": verifiers})


def reward_config(reward: RewardConfig, systems: SystemsConfig) -> RewardConfig:
    """The section `reward`, with the name and arguments of the reward that is really called."""
    spec = reward_spec(reward, systems)
    return reward.model_copy(update={"name": spec.name, "args": dict(spec.args)})


def check_rewardable(config: GradingConfig, rows: Sequence[Row]) -> None:
    """Raise DataError for a row without a field that its environment needs, or else the reward, or a verifier that may
    be drawn for it."""
    plain = check_environment_rows(config.environment, rows)
    own_system = (row for row in plain if row.messages[0].role == "system")
    others = (row for row in plain if row.messages[0].role != "system")
    given = given_fields(config.judge)
    check_fields(RewardSpec(config.reward.name, config.reward.args), own_system, given)
    check_fields(reward_spec(config.reward, config.systems), others, given)


def given_fields(judge: RlJudgeConfig | None) -> tuple[str, ...]:
    """The fields that the reward gets in addition to those of the row."""
    return () if judge is None else (JUDGE_FIELD,)
