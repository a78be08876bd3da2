"""Tries an environment: one episode with a real engine, which a person can watch turn by turn."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.base import apply_overrides, validate_config
from posttrain.context import StageContext
from posttrain.data.rows import load_rows
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.episodes.tools import check_environment_rows
from posttrain.errors import ConfigError, DataError
from posttrain.eval.config import EvalConfig
from posttrain.eval.replies import eval_requests, flights
from posttrain.model.folder import check_folder
from posttrain.model.tokenizer import load_tokenizer
from posttrain.pipeline.lengths import settled
from posttrain.records import Message, Rollout, Row
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.rollouter import Flight

COMMAND = "environments try"  # to begin a message with


def episode_config(environment: str, model: str, data: str, *, settings: Sequence[str] = ()) -> EvalConfig:
    """The config of an `eval` stage that samples one episode of each row. settings: `key=value` of such a stage.

    Raises ConfigError for a key or value that is wrong.
    """
    given: dict[str, Any] = {
        "model": {"path": model},
        "data": {"path": data},
        "environment": {"name": environment},
        "greedy": False,
        "samples": 1,
        "k": 1,
    }
    config = settled(validate_config(EvalConfig, apply_overrides(given, settings), COMMAND), COMMAND)
    if config.greedy or config.samples != 1:
        raise ConfigError(COMMAND, ["greedy and samples have no use here: one episode is sampled; remove them"])
    return config


def row_of(config: EvalConfig, identity: str | None) -> Row:
    """The row with this id, or the first. Raises DataError if there is none, or if it lacks a field that the
    environment needs, and PluginError for the environment."""
    rows = load_rows(config.data, kind="prompt", stage="eval")
    found = rows[0] if identity is None else next((row for row in rows if row.id == identity), None)
    if found is None:
        raise DataError(f"--row: no row of {config.data.path} has the id {identity!r}; the first has {rows[0].id!r}")
    check_environment_rows(config.environment, [found])
    return found


def file_and_id(text: str) -> tuple[str, str | None]:
    """FILE or FILE:ID as (file, id or None)."""
    path, colon, identity = text.rpartition(":")
    return (path, identity) if colon and not Path(text).exists() else (text, None)


def checked_episode(config: EvalConfig, row: Row) -> Flight:
    """The episode before it begins. Raises CheckpointError for the model's folder, and DataError for a prompt that does
    not fit."""
    check_folder(config.model.path)
    (flight,) = flights(eval_requests([row], load_tokenizer(config.model.path, config.model.chat_template), config))
    return flight


def try_episode(
    config: EvalConfig, flight: Flight, context: StageContext, *, heard: Callable[[int, Message], None]
) -> Rollout:
    """Make the episode. Needs an initialised Ray session.

    heard: gets each turn with its place in the conversation, as soon as it is known; the prompt's turns come first. If
    the environment's process is lost, the episode begins again, at place 0.
    """
    assert config.environment is not None
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    rollouter = EnvironmentRollouter(
        config.environment, tokenizer, length=config.engine.length, seed=context.seed, heard=heard
    )

    async def sample(engines: Engines) -> None:
        async with rollouter, SampledGroups(context, engines, config.engine, rollouter=rollouter) as sampled:
            await sampled.groups([flight])

    with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
        asyncio.run(sample(engines))
    return flight.rollouts[0]
