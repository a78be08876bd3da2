"""Pipeline YAML: its schema, and how a file and its overrides become one raw mapping for each stage.

    name: quickstart
    stages:
      - {name: sft, kind: sft, config: ../configs/quickstart/sft.yaml}
      - {name: rl, kind: rl, config: {model: {path: "${sft.model}"}, ...}}
    evaluate: {config: ../configs/quickstart/eval.yaml, stages: [sft, rl]}

A `config` path is relative to the pipeline file; paths inside a stage's config are relative to the current directory.
graph.py then checks what the stages mean and whether they fit together.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from posttrain.config.base import Config, apply_overrides, config_problems, read_yaml
from posttrain.config.trackers import TrackersConfig
from posttrain.errors import ConfigError
from posttrain.resources import bundled, bundled_names

_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_-]*$")


class StageEntry(Config):
    """One stage of a pipeline."""

    name: str = Field(
        description="Name of the stage: of its folder in the run directory, and in references such as ${sft.model}."
    )
    kind: str = Field(description="Kind of the stage: base, filter, sft, rl, dpo or eval.")
    config: str | dict[str, Any] = Field(
        description="Path of the stage's YAML file, relative to this file, or the mapping itself."
    )


class EvaluateEntry(Config):
    """The stages whose models are evaluated, each as soon as its stage is finished, and the config for that."""

    config: str | dict[str, Any] = Field(
        description="Path or mapping of an eval config. Its model.path is set to the model of each stage in turn."
    )
    stages: list[str] = Field(description="Names of the stages to evaluate; each must make a model.")


class PipelineConfig(Config):
    """A pipeline: stages that refer to each other's outputs."""

    name: str = Field(description="Name of the pipeline; its run directory is runs/NAME by default.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of every stage.")
    warm_engines: bool = Field(
        False,
        description="Keep vLLM engines running between stages, so that a stage with the same engine settings loads its "
        "weights into them rather than starting its own.",
    )
    storage: str | None = Field(
        default=None,
        description="Where the run is copied to while it goes on: a folder, s3://BUCKET/PATH, gs:// or az://. "
        "`posttrain run --resume URI` continues it on another host. null copies nothing.",
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Trackers that get the metrics besides metrics.jsonl, for each stage without trackers of its own.",
    )
    stages: Annotated[list[StageEntry], Field(min_length=1)] = Field(
        description="The stages, in any order that the references between them allow."
    )
    evaluate: EvaluateEntry | None = Field(
        default=None, description="Which stages' models are evaluated, and how; null evaluates none."
    )


RESERVED = (*PipelineConfig.model_fields, "run", "verdicts")


@dataclass(frozen=True, slots=True)
class RawStage:
    """A stage before its schema is applied.

    file: where the config was read. prefix: put before its key paths in messages.
    """

    name: str
    kind: str
    config: dict[str, Any]
    file: str
    prefix: str


@dataclass(frozen=True)
class RawPipeline:
    """A pipeline before its stages are validated. problems: the problems found so far, one line each.

    alone: True for the file of a single stage. open_references: True if that file may refer to stages of a pipeline
    that was not read.
    """

    source: str
    config: PipelineConfig
    stages: list[RawStage]
    evaluate: RawStage | None = None
    problems: list[str] = field(default_factory=list)
    alone: bool = False
    open_references: bool = False


def find_pipeline(name: str | Path) -> Path:
    """The file that `posttrain run NAME` means: a path, or the name of a bundled pipeline."""
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    if str(name) in bundled_names("pipelines"):
        return bundled("pipelines", str(name))
    near = difflib.get_close_matches(str(name), bundled_names("pipelines"), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(str(name), [f"no such file, and no bundled pipeline of that name{hint}; "
                                  f"bundled: {', '.join(bundled_names('pipelines'))}"])  # fmt: skip


def read_pipeline(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> RawPipeline:
    """Read a pipeline (a file, a bundled name or a mapping) and the files it names, with overrides applied.

    An override is `key.path=value`; its first part is a stage's name, `evaluate`, or a key of the pipeline itself.
    Raises ConfigError if the pipeline itself cannot be read. Problems of its stages are returned in `problems`.
    """
    if isinstance(source, Mapping):
        label, folder, data = "pipeline", Path.cwd(), dict(source)
    else:
        path = find_pipeline(source)
        label, folder, data = str(path), path.parent, read_yaml(path)
    top, inner, problems = _split_overrides(data, overrides)
    data = apply_overrides(data, top)
    try:
        config = PipelineConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(label, problems + config_problems(PipelineConfig, data, error)) from None
    problems += _name_problems(config)
    stages = []
    for entry in config.stages:
        stage = _read_stage(
            entry.name,
            entry.kind,
            entry.config,
            folder=folder,
            label=label,
            overrides=inner.get(entry.name, []),
            problems=problems,
        )
        if stage:
            stages.append(stage)
    evaluate = None
    if config.evaluate:
        item = config.evaluate
        evaluate = _read_stage(
            "evaluate",
            "eval",
            item.config,
            folder=folder,
            label=label,
            overrides=inner.get("evaluate", []),
            problems=problems,
        )
    return RawPipeline(label, config, stages, evaluate, problems)


def single_stage(
    kind: str,
    config: str | Path | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    open_references: bool = False,
) -> RawPipeline:
    """A pipeline of one stage, named after its kind, from a stage file or from a mapping with the same keys.

    overrides: `key.path=value`, with keys of the stage's config.
    open_references: accept `${stage.output}`, to check a file that belongs to a pipeline; the result cannot be run.
    """
    label, read = (kind, dict(config)) if isinstance(config, Mapping) else (str(config), read_yaml(config))
    if isinstance(read.get("stages"), list):
        raise ConfigError(label, [f"is a pipeline, as it has `stages`, not the config of one {kind} stage; use "
                                  f"posttrain run {label}"])  # fmt: skip
    data = apply_overrides(read, overrides)
    entry = StageEntry(name=kind, kind=kind, config=data)
    pipeline = PipelineConfig(name=kind, seed=seed, warm_engines=False, trackers=None, stages=[entry])
    stage = RawStage(kind, kind, data, label, "")
    return RawPipeline(label, pipeline, [stage], alone=True, open_references=open_references)


def _read_stage(
    name: str,
    kind: str,
    config: str | dict[str, Any],
    *,
    folder: Path,
    label: str,
    overrides: Sequence[str],
    problems: list[str],
) -> RawStage | None:
    """One stage with its config as a mapping; None, with a line added to `problems`, if it cannot be read."""
    file = label
    try:
        if isinstance(config, str):
            path = Path(config).expanduser()
            path = Path(os.path.normpath(path if path.is_absolute() else folder / path))
            config, file = read_yaml(path), str(path)
        return RawStage(name, kind, apply_overrides(config, overrides), file, f"{name}.")
    except ConfigError as error:
        problems.extend(f"{name}.config: {error.source}: {problem}" for problem in error.problems)
        return None


def _split_overrides(
    data: Mapping[str, object], overrides: Sequence[str]
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """(overrides of the pipeline itself, overrides of each stage's config by stage name, problems)."""
    listed = data.get("stages")
    entries = listed if isinstance(listed, list) else []
    names = [entry["name"] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)]
    if data.get("evaluate"):
        names.append("evaluate")
    top: list[str] = []
    inner: dict[str, list[str]] = {}
    problems: list[str] = []
    for override in overrides:
        key, sign, _ = override.partition("=")
        first, dot, _ = key.strip().partition(".")
        if not sign or not first:
            problems.append(f"override {override!r}: must have the form key.path=value")
        elif dot and first in names:
            inner.setdefault(first, []).append(override.strip()[len(first) + 1 :])
        elif first == "trackers" or (not dot and first in ("name", "seed", "warm_engines", "evaluate", "storage")):
            top.append(override)
        else:
            known = [*names, "seed", "warm_engines", "trackers", "name", "storage"]
            near = difflib.get_close_matches(first, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            what = "key of the pipeline" if not dot else "stage"
            problems.append(f"override {override!r}: no {what} {first!r}; {hint}")
    return top, inner, problems


def _name_problems(config: PipelineConfig) -> list[str]:
    """Problems with the names of the pipeline and of its stages."""
    problems = []
    if not _NAME.match(config.name):
        problems.append(f"name: got {config.name!r}: must be letters, digits, - and _, beginning with a letter")
    seen: dict[str, int] = {}
    for index, entry in enumerate(config.stages):
        key = f"stages.{index}.name"
        if not _NAME.match(entry.name):
            problems.append(f"{key}: got {entry.name!r}: must be letters, digits, - and _, beginning with a letter")
        elif entry.name in RESERVED:
            problems.append(f"{key}: got {entry.name!r}: this name is reserved; choose another name")
        if entry.name in seen:
            problems.append(
                f"{key}: got {entry.name!r}: stages.{seen[entry.name]} has this name already; names must differ"
            )
        seen.setdefault(entry.name, index)
    return problems
