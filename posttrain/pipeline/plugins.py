"""What is wrong with the rewards and environments of a config, and with the rows that they would get, found by reading.

No plug-in is imported: its source is parsed (`scoring.plugins`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.config.environments import EnvironmentConfig, EnvironmentFunctionConfig
from posttrain.config.rewards import RewardFunctionConfig, VerifierConfig
from posttrain.errors import UserError

CHECKED_ROWS = 100


def plugin_problems(plugin: RewardFunctionConfig | EnvironmentFunctionConfig) -> list[str]:
    """One line for each problem of a reward or an environment, which begins with its key."""
    from posttrain.episodes.tools import environment_tools
    from posttrain.scoring.plugins.lookup import check_environment, check_reward

    try:
        if isinstance(plugin, EnvironmentFunctionConfig):
            check_environment(plugin.name, plugin.args, python=plugin.python or "")
            environment_tools(plugin)
        else:
            check_reward(plugin.name, plugin.args, python=getattr(plugin, "python", None) or "")
    except UserError as error:
        return [f".name: {line}" for line in str(error).splitlines()]
    return []


def plugin_files(plugin: RewardFunctionConfig | EnvironmentFunctionConfig) -> list[Path]:
    """The files of a plug-in that is named by its file, and of the rewards that it combines."""
    from posttrain.scoring.plugins.lookup import RewardSpec, inner_rewards, resolve_function

    specs = [RewardSpec(plugin.name, plugin.args)]
    try:
        if isinstance(plugin, RewardFunctionConfig):
            specs += inner_rewards(specs[0])
        targets = [resolve_function(spec.name, "plug-in") for spec in specs if ".py:" in spec.name]
    except UserError:  # plugin_problems reports it
        return []
    return [Path(target.path) for target in targets if target.path]


def unfit_rows(data: DataConfig, config: Any, rewards: Sequence[RewardFunctionConfig]) -> list[str]:
    """One line for each of the first rows that lacks a field which its environment, or a reward of it, needs; and one
    for the first that has pictures and an environment.
    """
    from posttrain.data.images.section import passing_reader
    from posttrain.data.rows import load_rows
    from posttrain.episodes.tools import check_shown
    from posttrain.scoring.plugins.lookup import ENVIRONMENT, RewardSpec
    from posttrain.scoring.plugins.requirements import missing_fields

    try:
        with passing_reader(getattr(config, "images", None)) as reader:
            rows = load_rows(data, kind="prompt", limit=CHECKED_ROWS, images=reader)
    except UserError:  # data_problems reports it
        return []
    environment: EnvironmentConfig | None = getattr(config, "environment", None)
    keys = {row.id: environment.key_of(row.capability) if environment is not None else None for row in rows}
    plain = [row for row in rows if environment is None or not environment.gives_reward(row.capability)]
    # Only to these a verifier's system instruction is added.
    bare = [row for row in plain if row.messages[0].role != "system"]
    given = [] if getattr(config, "judge", None) is None else ["judge"]  # RL's judge gives its verdict to the reward
    lines: list[str] = []
    try:
        if environment is not None:
            check_shown(environment, rows)
        for reward in rewards:
            met = bare if isinstance(reward, VerifierConfig) else plain
            lines += missing_fields(RewardSpec(reward.name, reward.args), met, given)
        for key, function in environment.functions.items() if environment is not None else ():
            of_it = [row for row in rows if keys[row.id] == key]
            lines += missing_fields(RewardSpec(function.name, function.args), of_it, kind=ENVIRONMENT)
    except UserError as error:
        lines += str(error).splitlines()
    return lines
