"""Compares the length of each engine (`max_model_len`, in tokens) with the longest that its model supports.

`length_problems` runs before the engine starts, and refuses a length in the config that is too long, if the model
already exists. `settled` runs in the stage's own process, when every model exists. It gives an engine without a length
in the config the length that its model supports. Left out: how well a model works at that length.
"""

from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel

from posttrain.config.base import Config, validate_config
from posttrain.config.engines import EngineConfig
from posttrain.errors import ConfigError
from posttrain.model.adapter import base_folder
from posttrain.model.length import ModelLength, engine_length, model_length
from posttrain.pipeline.engines import attention_problems, engines_of

ConfigT = TypeVar("ConfigT", bound=Config)


def length_problems(config: BaseModel) -> list[str]:
    """One line, beginning with the key path, for each engine whose length in the config its model does not support."""
    problems = []
    for key, engine, path, length in _engines(config):
        asked = engine.max_model_len
        if asked is not None and asked > length.tokens:
            problems.append(
                f"{key}.max_model_len: got {asked}: the model in {path!r} can hold {length.tokens} tokens "
                f"({length.key} in its config.json); set at most {length.tokens}, or remove the key for as many as fit"
            )
        elif asked is None and length.tokens < engine.length:
            problems += _refused(config, key, path, length=length)
    return problems


def settled(config: ConfigT, source: str) -> ConfigT:
    """The config with the length of every engine filled in, no longer than its model supports.

    source: file or name of the config, for error messages. Raises ConfigError for a length in the config that is too
    long, for a model whose length leaves no room for what other keys require, such as `max_tokens`, and for one that an
    engine on a CPU cannot compute.
    """
    if problems := length_problems(config) + attention_problems(config):
        raise ConfigError(source, problems)
    data = config.model_dump()
    for key, engine, path, _ in _engines(config):
        _set(data, key, engine_length(engine, path))
    return validate_config(type(config), data, source)


def _refused(config: BaseModel, key: str, path: str, *, length: ModelLength) -> list[str]:
    """The problems that the schema finds if the engine has the length of its model."""
    data = config.model_dump()
    _set(data, key, length.tokens)
    try:
        validate_config(type(config), data, "")  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        why = f"the model in {path!r} can hold {length.tokens} tokens, {length.key} in its config.json"
        return [f"{problem.removeprefix('(whole file): ')}; {why}" for problem in error.problems]
    return []


def _set(data: dict, key: str, tokens: int) -> None:
    for part in key.split("."):
        data = data[part]
    data["max_model_len"] = tokens


def _engines(config: BaseModel) -> Iterator[tuple[str, EngineConfig, str, ModelLength]]:
    """(key path, engine, folder of its model, length of the model) of each engine whose model's length is known."""
    for asked in engines_of(config):
        length = model_length(base_folder(asked.path))
        if length is not None:
            yield asked.key, asked.engine, asked.path, length
