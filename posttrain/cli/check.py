"""Reads a YAML file of the user, and finds its schema: that of a pipeline, or that of one kind of stage."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from posttrain.config.base import Config, apply_overrides, read_yaml
from posttrain.errors import ConfigError
from posttrain.pipeline.config import PipelineConfig, RawPipeline, find_pipeline, read_pipeline, single_stage
from posttrain.pipeline.kinds import KINDS, load_schema, unknown_kind

_KEY_FAULTS = ("extra_forbidden", "missing")


def read_any(file: str, overrides: Sequence[str] = (), kind: str | None = None) -> RawPipeline:
    """Read a pipeline (a file with `stages`) or the config of one stage.

    kind: the kind of stage; None takes the kind whose schema fits best. Raises ConfigError.
    """
    path = find_pipeline(file)
    data = read_yaml(path)
    if kind is None and "stages" in data:
        return read_pipeline(path, overrides)
    if kind is not None and kind not in KINDS:
        raise ConfigError("--kind", [unknown_kind(kind)])
    kind = kind or guess_kind(path, apply_overrides(data, overrides))
    return single_stage(kind, path, overrides, open_references=True)


def read_pipeline_file(file: str, overrides: Sequence[str] = ()) -> RawPipeline:
    """Read a pipeline. For the config of a single stage, raises ConfigError that names the right command."""
    path = find_pipeline(file)
    data = read_yaml(path)
    if "stages" not in data and not data.keys() <= PipelineConfig.model_fields.keys():
        kind = guess_kind(path, data)
        command = f"posttrain {kind} {file}" if kind != "base" else "a pipeline with a stage of kind base"
        raise ConfigError(
            file, [f"has no `stages`, so it is not a pipeline but the config of one stage; use {command}"]
        )
    return read_pipeline(path, overrides)


def guess_kind(path: Path, data: dict) -> str:
    """The kind of stage whose schema finds the fewest unknown and missing keys in `data`, then the fewest problems.

    If several kinds find equally few, the kind that occurs in the file's name is taken.
    """
    faults: dict[str, tuple[int, int]] = {}
    for name, kind in KINDS.items():
        try:
            load_schema(kind).model_validate(data)
            faults[name] = 0, 0
        except ValidationError as error:
            of_keys = [found for found in error.errors(include_url=False) if found["type"] in _KEY_FAULTS]
            faults[name] = len(of_keys), error.error_count()
    best = min(faults.values())
    likely = [name for name, count in faults.items() if count == best]
    return next((name for name in likely if name in path.stem), likely[0])


def schema_of(name: str) -> type[Config]:
    """The schema of a kind of stage, or of a pipeline. Raises ConfigError for any other name."""
    if name == "pipeline":
        return PipelineConfig
    if name in KINDS:
        return load_schema(KINDS[name])
    known = [*KINDS, "pipeline"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise ConfigError("schema", [f"got {name!r}: no such stage; {hint}"])
