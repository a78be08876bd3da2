"""Decides what happens to each node of a pipeline: run, continue, skip or leave out. Changes nothing on disk.

The basis of a node needs only the hashes of the nodes to which it refers, so all decisions are made before anything
runs, and `run`, `run --dry-run` and `validate` share them. Finished results and unfinished work are continued or
replaced; a replacement needs the user's consent (replace.py).
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.pipeline.changes import find_changes
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.hashing import Basis, basis_hash, make_basis
from posttrain.pipeline.rundir import RunDir

Action = Literal["run", "continue", "skip", "leave out"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one node.

    why: the reason, for the user. basis: the basis with which it would run now; None if it is left out or taken as it
    is. step: the step from which it continues. replaces: the content of its folder that would be lost, such as `a
    finished result`; "" for none. agreed: True if the user asked for this replacement (--from).
    """

    action: Action
    input_hash: str
    why: str
    basis: Basis | None = None
    step: int = 0
    replaces: str = ""
    agreed: bool = False

    @property
    def text(self) -> str:
        """The decision for the user, such as `continue from step 30: steps: 30 → 40`."""
        if self.action == "run" and self.replaces:
            return f"run anew because {self.why}"
        start = f" from step {self.step}" if self.action == "continue" and self.step else ""
        return f"{self.action}{start}: {self.why}"

    @property
    def to_do(self) -> bool:
        """True if the node runs."""
        return self.action in ("run", "continue")


def decide(
    pipeline: Pipeline, run_dir: RunDir, *, start_from: str | None = None, only: str | None = None
) -> dict[str, Decision]:
    """The decision for each node, by name.

    start_from: run this node again, and all nodes that need it, even if they are finished. The nodes that it needs must
    be finished and are not run. only: run no other node, except the stage's own evaluation; again the nodes that it
    needs must be finished. Raises ConfigError for an unknown name, and for a needed stage that was never finished.
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
    if problems:
        raise ConfigError(pipeline.source, problems)
    return decisions


def _decide_one(
    node: Node, pipeline: Pipeline, run_dir: RunDir, *, decisions: dict[str, Decision], forced: bool
) -> Decision:
    """The decision for a node that may run, from the content of its folder and the changes since then."""
    basis = make_basis(node, pipeline, _hashes(node, decisions))
    digest, held = basis_hash(basis), run_dir.held(node)
    if held.input_hash == digest and not held.finished:
        return Decision("continue", digest, "it was interrupted", basis, held.step)
    if forced:
        return Decision("run", digest, "asked for by --from", basis, replaces=held.worth, agreed=True)
    if held.input_hash == digest and held.missing:
        return Decision("continue", digest, f"{', '.join(held.missing)} is gone", basis, held.step)
    if held.input_hash == digest:
        return Decision("skip", digest, "config, inputs and code are as before", basis)
    if not held.input_hash:
        return Decision("run", digest, "new", basis)
    changes = find_changes(held.basis, basis, node.config, upstream=_fates(node, decisions))
    why = "; ".join(change.text for change in changes)
    unfinished = held.has_work and not held.finished
    if (held.step or unfinished) and all(change.goes_on for change in changes):
        return Decision("continue", digest, why, basis, held.step)
    return Decision("run", digest, why, basis, replaces=held.worth)


def _taken_as_it_is(node: Node, pipeline: Pipeline, run_dir: RunDir, *, decisions: dict[str, Decision]) -> Decision:
    """The decision for a node that must not run again: skip it if it is finished, else leave it out."""
    record = run_dir.done(node)
    if record is None:
        return Decision("leave out", "", "not asked for")
    digest = str(record.get("input_hash", ""))
    try:
        same = digest == basis_hash(make_basis(node, pipeline, _hashes(node, decisions)))
    except FileNotFoundError:
        same = False
    why = "finished before" if same else "finished before, from another config, inputs or code; taken as it is"
    return Decision("skip", digest, why)


def _hashes(node: Node, decisions: dict[str, Decision]) -> dict[str, str]:
    return {name: decisions[name].input_hash for name in node.needs}


def _fates(node: Node, decisions: dict[str, Decision]) -> dict[str, str]:
    """What happens to each node that a node needs, by name, as text for the user."""
    words = {"run": "runs anew", "continue": "goes on"}
    return {name: words[decisions[name].action] for name in node.needs if decisions[name].to_do}


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
