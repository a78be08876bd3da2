"""Turns a raw pipeline into ordered nodes: validates each config and finds the node of each `${stage.output}`.

The problems of all stages are reported together, before anything heavy is imported. inputs.py checks whether the files
and folders that the configs name exist.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.config.base import NO_VARIABLES, Config, config_problems
from posttrain.config.trackers import TrackersConfig
from posttrain.errors import ConfigError
from posttrain.pipeline.config import RawPipeline, RawStage, read_pipeline
from posttrain.pipeline.engines import attention_problems
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS, StageKind, load_schema, unknown_kind
from posttrain.pipeline.lengths import length_problems
from posttrain.pipeline.packages import package_problems, tracker_problems
from posttrain.pipeline.references import Reference, find_cycle, find_references, replace_references, topological


@dataclass(frozen=True)
class Node:
    """A stage, or the evaluation of a stage's model.

    name: `sft`, or `sft.eval` for its evaluation. folder: relative to the run directory, `sft` or `sft/eval`.
    config: validated, with `${stage.output}` still in it. needs: names of the nodes that it refers to.
    of: for an evaluation, the name of the stage that it evaluates; else "".
    """

    name: str
    kind: str
    config: Config
    needs: tuple[str, ...]
    folder: str
    file: str
    prefix: str
    of: str = ""

    @property
    def stage_kind(self) -> StageKind:
        """The kind's line in the table of kinds."""
        return KINDS[self.kind]

    def resolved(self, run_dir: Path, nodes: "Mapping[str, Node]") -> Config:
        """The config with paths below `run_dir` in place of its references."""
        data = replace_references(
            self.config.model_dump(), lambda stage, output: str(output_path(nodes[stage], output, run_dir))
        )
        return type(self.config).model_validate(data)


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline. `nodes` are in an order in which each node comes after the nodes it needs."""

    source: str
    name: str
    seed: int
    warm_engines: bool
    nodes: dict[str, Node]
    storage: str | None = None

    @property
    def stages(self) -> list[Node]:
        """The stages in the user's order, without their evaluations."""
        return [node for node in self.nodes.values() if not node.of]

    def dump(self) -> dict[str, Any]:
        """The pipeline with every default written out, as a mapping. Written as YAML it is a pipeline file itself."""
        stages = [
            {"name": node.name, "kind": node.kind, "config": node.config.model_dump(mode="json")}
            for node in self.stages
        ]
        data = {"name": self.name, "seed": self.seed, "warm_engines": self.warm_engines, "stages": stages}
        if self.storage is not None:
            data["storage"] = self.storage
        evaluations = [node for node in self.nodes.values() if node.of]
        if evaluations:
            config = evaluations[0].config.model_dump(mode="json")
            data["evaluate"] = {"config": config, "stages": [node.of for node in evaluations]}
        return data

    def descendants(self, name: str) -> set[str]:
        """Names of all nodes that need `name`, directly or through others."""
        found: set[str] = set()
        for node in self.nodes.values():
            if name in node.needs or found & set(node.needs):
                found.add(node.name)
        return found


def output_path(node: Node, output: str, run_dir: Path) -> Path:
    """The path that `${node.output}` stands for, whether or not it exists yet."""
    return run_dir / node.folder / node.stage_kind.outputs[output]


def load_pipeline(source: str | Path | Mapping[str, object] | RawPipeline, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline: schemas, references, and the inputs that exist outside of it.

    source: a file, a bundled name, a mapping, or what `single_stage` returned. Raises ConfigError with every problem.
    Takes well under two seconds and imports neither torch nor Ray.
    """
    raw = source if isinstance(source, RawPipeline) else read_pipeline(source, overrides)
    problems = list(raw.problems)
    kinds = {} if raw.alone else {entry.name: entry.kind for entry in raw.config.stages}
    nodes = [
        node
        for stage in raw.stages
        if (node := _make_node(stage, kinds, problems, open_references=raw.open_references))
    ]
    nodes += _evaluations(raw, kinds, problems)
    problems += tracker_problems(raw.config)
    for node in nodes:
        missing = package_problems(node.config, node.stage_kind)
        problems += [f"{node.name}: kind {node.kind} {line}" for line in missing]
        found = tracker_problems(node.config) + input_problems(node.config, node.stage_kind)
        found += length_problems(node.config) + attention_problems(node.config)
        problems += [_located(node, problem) for problem in found]
    cycle = find_cycle({node.name: node.needs for node in nodes})
    if cycle:
        problems.append(f"stages: {' → '.join(cycle)}: a cycle; each stage must need earlier ones only")
    if problems:
        raise ConfigError(raw.source, list(dict.fromkeys(problems)))
    by_name = {node.name: replace(node, config=with_trackers(node.config, raw.config.trackers)) for node in nodes}
    order = topological({name: node.needs for name, node in by_name.items()})
    config = raw.config
    return Pipeline(
        raw.source,
        config.name,
        config.seed,
        config.warm_engines,
        {name: by_name[name] for name in order},
        config.storage,
    )


def with_trackers(config: Config, trackers: TrackersConfig | None) -> Config:
    """A stage's config with the pipeline's trackers, if the stage names none itself and reports metrics by step."""
    if "trackers" not in type(config).model_fields or getattr(config, "trackers", None) is not None:
        return config
    return config.model_copy(update={"trackers": trackers})


def _make_node(
    stage: RawStage, kinds: Mapping[str, str], problems: list[str], *, open_references: bool = False
) -> Node | None:
    """The node of one stage; None, with lines added to `problems`, if its config is wrong.

    kinds: name to kind of each stage that may be referred to.
    """
    if stage.kind not in KINDS:
        problems.append(f"{stage.prefix}kind: {unknown_kind(stage.kind)}")
        return None
    references = list(find_references(stage.config))
    checked = [item for item in references if not (open_references and item.stage)]  # other stages are not known then
    wrong = [problem for reference in checked if (problem := _reference_problem(reference, kinds))]
    schema = load_schema(KINDS[stage.kind])
    config, found = None, []
    try:
        config = schema.model_validate(stage.config)
    except ValidationError as error:
        found = config_problems(schema, stage.config, error)
    problems.extend(_located(stage, problem) for problem in wrong + found)
    if config is None:
        return None
    needs = dict.fromkeys(reference.stage for reference in references if reference.stage in kinds)
    return Node(stage.name, stage.kind, config, tuple(needs), stage.name, stage.file, stage.prefix)


def _evaluations(raw: RawPipeline, kinds: Mapping[str, str], problems: list[str]) -> list[Node]:
    """One node for each stage to evaluate.

    Its config is that of `evaluate`, with `model.path` set to the stage's model.
    """
    if raw.config.evaluate is None or raw.evaluate is None:
        return []
    nodes: list[Node] = []
    for index, name in enumerate(dict.fromkeys(raw.config.evaluate.stages)):
        key = f"evaluate.stages.{index}"
        if name not in kinds:
            problems.append(f"{key}: {_no_stage(name, kinds)}")
            continue
        if kinds[name] not in KINDS or "model" not in KINDS[kinds[name]].outputs:
            problems.append(f"{key}: got {name!r}: a stage of kind {kinds[name]} makes no model")
            continue
        model = raw.evaluate.config.get("model")
        model = {**(model if isinstance(model, Mapping) else {}), "path": f"${{{name}.model}}"}
        stage = replace(raw.evaluate, config={**raw.evaluate.config, "model": model})
        node = _make_node(stage, kinds, problems)
        if node:
            nodes.append(replace(node, name=f"{name}.eval", folder=f"{name}/eval", of=name))
    return nodes


def _reference_problem(reference: Reference, kinds: Mapping[str, str]) -> str:
    """The error text for a wrong reference, else "". kinds: name to kind of each stage that may be referred to."""
    if not reference.stage:
        return f"{reference.key}: got {reference.text!r}: must have the form ${{stage.output}}; {NO_VARIABLES}"
    if not kinds:
        return f"{reference.key}: got {reference.text!r}: there are no other stages here; give a path"
    if reference.stage not in kinds:
        return f"{reference.key}: got {reference.text!r}: {_no_stage(reference.stage, kinds)}"
    kind = kinds[reference.stage]
    outputs = KINDS[kind].outputs if kind in KINDS else {reference.output: ""}
    if reference.output in outputs:
        return ""
    near = difflib.get_close_matches(reference.output, outputs, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its outputs: {', '.join(outputs)}"
    return f"{reference.key}: got {reference.text!r}: stage {reference.stage!r} has no {reference.output!r}; {hint}"


def _no_stage(name: str, kinds: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, kinds, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(kinds)}"
    return f"no stage is called {name!r}; {hint}"


def _located(stage: RawStage | Node, problem: str) -> str:
    """A problem with its full key path in the pipeline, and the file it was read from."""
    where = f" (in {stage.file})" if stage.prefix else ""
    if stage.prefix and problem.startswith("(whole file): "):  # a rule about several keys of the stage's config
        problem = problem.replace("(whole file)", "config", 1)
    return f"{stage.prefix}{problem}{where}"
