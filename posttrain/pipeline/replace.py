"""Replaces earlier results: asks the user first, and keeps the old results until the new ones are complete.

    user agrees ─► moved to .replaced/STAGE/TIME ─► the stage runs ─► it is finished ─► the old result is deleted

All of them are moved before the first stage starts. So a run that fails or is killed can be continued without another
question, because the folders of the stages that it still has to run are empty. The old result of a stage is kept until
the stage is finished, however many runs that takes. To restore it, move the folder back.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.files import move_folder, remove
from posttrain.pipeline.decide import Decision
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.rundir import RunDir

FOLDER = ".replaced"
Ask = Callable[[str], bool]


def to_replace(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """The decisions that replace something, by the name of the node."""
    return {name: item for name, item in decisions.items() if item.action == "run" and item.replaces}


def require_consent(place: RunDir, decisions: Mapping[str, Decision], *, overwrite: bool, ask: Ask | None) -> None:
    """Return if the user asked for all replacements, or agrees to them. Otherwise raise ConfigError.

    ask: asks the user a question; None if nobody can answer. Nothing on disk is changed.
    """
    found = {name: item for name, item in to_replace(decisions).items() if not item.agreed}
    if overwrite or not found:
        return
    lines = [f"  {name}, {item.replaces}: {item.why}" for name, item in found.items()]
    text = "\n".join(["this run would replace", *lines])
    if ask is None:
        rule = f"  --overwrite allows it, and keeps them in {place.path / FOLDER} until the new ones are complete"
        raise ConfigError(str(place.path), [f"{text}\n{rule}; or choose another --run-dir"])
    if not ask(f"{place.path}: {text}\nReplace? The old results stay in {FOLDER} until the new ones are complete."):
        raise ConfigError(str(place.path), ["nothing was replaced, and nothing was started"])


def move_aside(pipeline: Pipeline, place: RunDir, decisions: Mapping[str, Decision]) -> dict[str, Path]:
    """Move each replaced result, with its events, into `.replaced`. Returns the new places by node name."""
    moved: dict[str, Path] = {}
    nodes = [pipeline.nodes[name] for name in to_replace(decisions)]
    for node in sorted(nodes, key=lambda node: not node.of):  # evaluations first: they lie in their stage's folder
        moved[node.name] = target = _free_place(place, node)
        move_folder(place.folder(node), target)
        _copy_events(place, node, target)
    return moved


def kept(place: RunDir, node: Node) -> list[Path]:
    """The folders of a node's earlier results that are still kept, oldest first."""
    return sorted((place.path / FOLDER / node.name).glob("*"))


def delete_kept(place: RunDir, node: Node) -> list[Path]:
    """Delete the earlier results of a node whose new result is complete. Returns the deleted folders."""
    found = kept(place, node)
    for path in found:
        with contextlib.suppress(OSError):
            remove(path)
    with contextlib.suppress(OSError):
        (place.path / FOLDER / node.name).rmdir()
        (place.path / FOLDER).rmdir()  # unless another stage has something there
    return found


def kept_text(pipeline: Pipeline, place: RunDir) -> str:
    """One line for each earlier result that is still kept, for the user of a run that ended early; "" for none."""
    return "".join(
        f"\n  The earlier result of {node.name} is in {path}"
        for node in pipeline.nodes.values()
        for path in kept(place, node)
    )


def _free_place(place: RunDir, node: Node) -> Path:
    """A new folder for an old result, below the folder of its node and named after the time in UTC."""
    path = place.path / FOLDER / node.name / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return next(
        free for number in itertools.count() if not (free := path.with_name(f"{path.name}{number or ''}")).exists()
    )


def _copy_events(place: RunDir, node: Node, target: Path) -> None:
    """Copy the stage's events to the old result, because they are removed from events.jsonl when the stage starts
    anew.
    """
    if place.events.exists():
        lines = place.events.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        own = [line for line in lines if f'"stage": {json.dumps(node.name)}' in line]
        (target / place.events.name).write_text("".join(own), encoding="utf-8")
