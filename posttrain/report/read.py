"""Reads a run directory into one record for the report. Files that a broken run left behind never raise an error.

A missing file counts as empty. A line or file that cannot be read is left out, and `notes`, which the report prints,
gets a line about it. Parquet files are not read here: each section reads the columns that it needs.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.base import read_yaml
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl

KINDS = ("base", "filter", "sft", "rl", "dpo", "eval")
LEFT_BY_STAGES = (
    "config.yaml", "metrics.jsonl", "DONE", "results.json",
    "kept.jsonl", "difficulty.parquet", "rollouts", "pairs.jsonl",
)  # fmt: skip
EVALUATION = ".eval"  # the end of the name of a stage's evaluation, as in "sft.eval"


@dataclass(frozen=True)
class Stage:
    """One stage of the run, or the evaluation of a stage.

    start, end: Unix times or None. figures: the stats that it returned. metrics: the lines of its metrics.jsonl. of:
    for an evaluation, the stage that it evaluates; else "". config: its config.yaml with every default, or {} if there
    is none. model: the model from which it started, or which it measured: the name of the stage of this run that made
    the model, else its path; "" if there is none or it is unknown.
    """

    name: str
    kind: str
    status: str
    dir: Path
    wall_s: float | None = None
    start: float | None = None
    end: float | None = None
    figures: Mapping[str, object] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()
    error: str = ""
    of: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    model: str = ""

    def setting(self, key: str) -> float | None:
        """The number at a key path of the config, such as `reward.alarm_fraction`; None if the config has none."""
        return setting(self.config, key)


@dataclass(frozen=True)
class Run:
    """The content of a run directory. evals: {stage name: its results by capability}, in the order of the stages."""

    dir: Path
    summary: Mapping[str, object]
    stages: tuple[Stage, ...]
    evaluations: tuple[Stage, ...]
    events: tuple[dict[str, Any], ...]
    evals: Mapping[str, Mapping[str, object]]
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[Stage]:
        """The stages of one kind."""
        return [stage for stage in self.stages if stage.kind == kind]

    def busy(self, stage: Stage) -> list[dict[str, Any]]:
        """The busy events of a stage that took some time, oldest first.

        Of a resumed stage, those of the last attempt.
        """
        found = [event for event in self.events if event.get("event") == "busy" and event.get("stage") == stage.name]
        whole = [e for e in found if number(e.get("start")) is not None and number(e.get("end")) is not None]
        since = stage.start or 0.0
        return sorted((e for e in whole if since <= e["start"] <= e["end"]), key=lambda event: event["start"])


def number(value: object) -> float | None:
    """`value` as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object; else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def setting(config: Mapping[str, object], key: str) -> float | None:
    """The number at a key path of a recorded config, or None."""
    value: Any = config
    for part in key.split("."):
        value = mapping(value).get(part)
    return number(value)


def read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The config.yaml of a stage's folder; {} if there is none or it cannot be read."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        notes.append(f"{folder.name}/config.yaml could not be read and was left out: {error}")
        return {}


def read_run(run_dir: Path) -> Run:
    """Read a run directory. No content of its files raises an error; an empty folder gives a run without stages."""
    notes: list[str] = []
    summary = mapping(read_json(run_dir / "summary.json", notes))
    events = tuple(sorted(read_lines(run_dir / "events.jsonl", notes), key=lambda e: number(e.get("t")) or 0.0))
    every = [_read_stage(run_dir, record, events, notes=notes) for record in _stage_records(run_dir, summary, events)]
    every = _with_models(every, _given_configs(run_dir, notes))
    stages = tuple(stage for stage in every if not stage.of)
    evaluations = tuple(stage for stage in every if stage.of)
    evals = _read_evals(summary, stages, evaluations, notes=notes)
    return Run(run_dir, summary, stages, evaluations, events, evals, tuple(notes))


def read_json(path: Path, notes: list[str]) -> Any:
    """The content of a JSON file; None if it is missing or cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read and was left out: {error}")
        return None


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a JSON-lines file. Lines that cannot be read are counted in `notes`."""
    bad: list[None] = []
    records = list(read_jsonl(path, lambda: bad.append(None)))
    if bad:
        notes.append(f"{path.parent.name}/{path.name}: {len(bad)} unreadable line{'s' * (len(bad) > 1)} left out.")
    return records


def _stage_records(run_dir: Path, summary: Mapping[str, object], events: tuple[dict, ...]) -> list[dict[str, Any]]:
    """The stages that the summary lists, then those that only events or folders show, such as after a kill."""
    records: list[dict[str, Any]] = []
    for part in ("stages", "evaluations"):
        listed = summary.get(part)
        records += [dict(s) for s in listed if mapping(s).get("name")] if isinstance(listed, list) else []
    names = {str(record["name"]) for record in records}
    started = [str(e["stage"]) for e in events if e.get("event") == "stage_start" and e.get("stage")]
    folders = sorted(p.name for p in run_dir.iterdir() if p.is_dir() and _looks_like_stage(p))
    return records + [{"name": name} for name in dict.fromkeys([*started, *folders]) if name not in names]


def _given_configs(run_dir: Path, notes: list[str]) -> dict[str, Mapping[str, Any]]:
    """The configs in pipeline.yaml by stage. They hold references such as ${sft.model}; a config.yaml holds paths."""
    if not (run_dir / "pipeline.yaml").is_file():
        return {}
    try:
        stages = read_yaml(run_dir / "pipeline.yaml").get("stages")
    except ConfigError as error:
        notes.append(f"pipeline.yaml could not be read and was left out: {error}")
        return {}
    listed = map(mapping, stages if isinstance(stages, list) else [])
    return {str(stage["name"]): mapping(stage.get("config")) for stage in listed if "name" in stage}


def _with_models(stages: list[Stage], given: Mapping[str, Mapping[str, Any]]) -> list[Stage]:
    folders = {stage.name: stage.dir for stage in stages if not stage.of}
    known = [next(filter(None, (_model_of(c, folders) for c in (given.get(s.name, {}), s.config))), "") for s in stages]
    return [replace(stage, model=model) for stage, model in zip(stages, known, strict=True)]


def _model_of(config: Mapping[str, Any], folders: Mapping[str, Path]) -> str:
    """The model that a stage's config names: the name of the stage of this run that made it, or its path; else "".

    config: with references such as ${sft.model}, or with paths. folders: {stage name: its folder}.
    """
    path = mapping(config.get("model")).get("path")
    if not isinstance(path, str):
        return ""
    for name, folder in folders.items():
        if path.startswith(f"${{{name}.") or os.path.realpath(path) == os.path.realpath(folder / "model"):
            return name
    return os.path.realpath(path)


def _looks_like_stage(folder: Path) -> bool:
    return any((folder / name).exists() for name in LEFT_BY_STAGES)


def _read_stage(run_dir: Path, record: dict[str, Any], events: tuple[dict, ...], *, notes: list[str]) -> Stage:
    """Read one stage from its record in the summary, its events and its folder."""
    name = str(record["name"])
    of = name.removesuffix(EVALUATION) if name.endswith(EVALUATION) else ""
    folder = run_dir / of / "eval" if of else run_dir / name
    mine = [event for event in events if event.get("stage") == name]
    by_event = {str(event.get("event")): event for event in mine}
    started = by_event.get("stage_start", {})
    ended = next((by_event[e] for e in ("stage_done", "stage_failed", "stage_interrupted") if e in by_event), {})
    start, end = number(started.get("t")), number(ended.get("t"))
    # A stage may have failed and then started again. Then an end before the last start belongs to the earlier attempt.
    end = None if start is not None and end is not None and end < start else end
    wall_s = number(record.get("wall_s"))
    if wall_s is None and start is not None and end is not None:
        wall_s = end - start
    error = record.get("error") or mapping(by_event.get("stage_failed")).get("error") or ""
    return Stage(
        name=name,
        kind=str(record.get("kind") or started.get("kind") or _guess_kind(name, folder)),
        status=str(record.get("status") or _guess_status(by_event, folder)),
        dir=folder,
        wall_s=wall_s,
        start=start,
        end=end,
        figures={**mapping(record.get("outputs")), **mapping(record.get("stats"))},
        metrics=tuple(read_lines(folder / "metrics.jsonl", notes)),
        error=str(error),
        of=of,
        config=read_config(folder, notes),
    )


def _guess_kind(name: str, folder: Path) -> str:
    """The kind of a stage that no summary lists, from its name and its files."""
    if (folder / "kept.jsonl").exists():
        return "filter"
    if (folder / "rollouts").exists() or (folder / "difficulty.parquet").exists():
        return "rl"
    if (folder / "pairs.jsonl").exists():
        return "dpo"
    return next((kind for kind in KINDS if kind == name.lower()), "eval" if (folder / "results.json").exists() else "")


def _guess_status(by_event: Mapping[str, object], folder: Path) -> str:
    """The status of a stage that no summary lists, from its last event and whether DONE exists."""
    if (folder / "DONE").exists():
        return "done"
    return "failed" if "stage_failed" in by_event else "interrupted"


def _read_evals(
    summary: Mapping[str, object], stages: tuple[Stage, ...], evaluations: tuple[Stage, ...], *, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Results by stage name, in the order of the stages: from the summary, else from the folders."""
    found = {str(name): mapping(results) for name, results in mapping(summary.get("eval")).items()}
    for stage in (*stages, *evaluations):
        name = stage.of or stage.name
        if not found.get(name):
            found[name] = mapping(read_json(stage.dir / "results.json", notes))
    order = [stage.name for stage in stages]
    ordered = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return {name: found[name] for name in ordered if found[name]}
