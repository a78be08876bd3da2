"""Decides what happens to each node of a pipeline in a run directory: run, resume, skip or leave out. Changes nothing.

The hash of a node needs only the hashes of the nodes it refers to, so all decisions are made before anything runs.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.hashing import input_hash
from posttrain.pipeline.rundir import RunDir

Action = Literal["run", "resume", "skip", "leave out"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one node. why: the reason, for the user. forced: its folder is emptied before anything starts."""

    action: Action
    input_hash: str
    why: str
    forced: bool = False


def decide(
    pipeline: Pipeline, run_dir: RunDir, *, start_from: str | None = None, only: str | None = None
) -> dict[str, Decision]:
    """The decision for each node, by name.

    start_from: run this node and all that need it again, even if they are finished. The nodes that it needs are taken
    as they are. only: leave out every other node, except the stage's own evaluation; what it needs is taken as it is.
    Raises ConfigError for an unknown name, and for a needed stage that was never finished.
    """
    for option, name in (("--from", start_from), ("--only", only)):
        if name is not None and name not in pipeline.nodes:
            near = difflib.get_close_matches(name, pipeline.nodes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(pipeline.nodes)}"
            raise ConfigError(pipeline.source, [f"{option}: got {name!r}: no such stage; {hint}"])
    forced = {start_from, *pipeline.descendants(start_from)} if start_from else set()
    chosen = {node.name for node in pipeline.nodes.values() if only in (None, node.name, node.of)}
    as_is = set(pipeline.nodes) - chosen
    if start_from:
        as_is |= _ancestors(pipeline, start_from)
    needed = {name for node in chosen - as_is for name in pipeline.nodes[node].needs} | (as_is & chosen)
    decisions: dict[str, Decision] = {}
    problems: list[str] = []
    for name, node in pipeline.nodes.items():
        if name in as_is:
            decisions[name] = _taken_as_it_is(node, pipeline, run_dir, decisions=decisions)
            if name in needed and decisions[name].action == "leave out":
                problems.append(f"stage {name!r} has not been finished in {run_dir.path}; run it first")
        else:
            decisions[name] = _decide_one(node, pipeline, run_dir, decisions=decisions, forced=name in forced)
            lost = decisions[name].action == "run" and not decisions[name].forced
            if lost and run_dir.has_unfinished_work(node):
                problems.append(
                    f"stage {name!r} was interrupted, and its config, inputs (a dataset, a model) or code have changed "
                    f"since: {run_dir.folder(node)} cannot go on from its checkpoint; give back what it began with, or "
                    f"start it anew in another --run-dir (posttrain run: or with --from {name})"
                )
    if problems:
        raise ConfigError(pipeline.source, problems)
    return decisions


def _decide_one(
    node: Node, pipeline: Pipeline, run_dir: RunDir, *, decisions: dict[str, Decision], forced: bool
) -> Decision:
    """The decision for a node that may run: by the state of its folder and its hash."""
    digest = _hash(node, pipeline, decisions)
    state = run_dir.state(node, digest)
    if state == "resume":
        return Decision("resume", digest, "continues where it was interrupted")
    if forced:
        return Decision("run", digest, "asked for by --from", forced=True)
    if state == "done":
        return Decision("skip", digest, "config, inputs and code are as before")
    return Decision("run", digest, "new" if state == "new" else "config, inputs, code or outputs have changed")


def _taken_as_it_is(node: Node, pipeline: Pipeline, run_dir: RunDir, *, decisions: dict[str, Decision]) -> Decision:
    """The decision for a node that must not run again: skip it if it is finished, else leave it out."""
    record = run_dir.done(node)
    if record is None:
        return Decision("leave out", "", "not asked for")
    digest = str(record.get("input_hash", ""))
    try:
        same = digest == _hash(node, pipeline, decisions)
    except FileNotFoundError:
        same = False
    why = "finished before" if same else "finished before, from another config, inputs or code; taken as it is"
    return Decision("skip", digest, why)


def _hash(node: Node, pipeline: Pipeline, decisions: dict[str, Decision]) -> str:
    return input_hash(node, pipeline, {name: decisions[name].input_hash for name in node.needs})


def _ancestors(pipeline: Pipeline, name: str) -> set[str]:
    """Names of all nodes that `name` needs, directly or through others."""
    found: set[str] = set()
    waiting = list(pipeline.nodes[name].needs)
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += pipeline.nodes[other].needs
    return found


def default_run_dir(pipeline: Pipeline) -> Path:
    """runs/NAME, relative to the current directory."""
    return Path("runs") / pipeline.name
