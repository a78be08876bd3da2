"""The run directory on disk: which pipeline it belongs to, what each stage has reached, and the lock of the run.

The files in a stage's folder tell its state. STARTED holds the hash of the run that was begun there. DONE, which is
written last, holds the hash and the outputs of the run that was finished. Every file that another process may read is
written under another name and then renamed, so nobody sees half of it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from posttrain.config.base import dump_yaml, read_yaml
from posttrain.errors import ConfigError
from posttrain.files import remove, write_text
from posttrain.pipeline.graph import Node, Pipeline

STARTED = "STARTED"
DONE = "DONE"
State = Literal["done", "resume", "new", "changed"]


class RunDir:
    """One run directory. Nothing is created before `open` is entered."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()
        self.events = self.path / "events.jsonl"
        self.summary = self.path / "summary.json"

    @contextmanager
    def open(self, pipeline: Pipeline) -> Iterator[None]:
        """Create the folder, refuse one of another pipeline, hold the lock, and write the resolved pipeline.yaml."""
        self.check(pipeline)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(str(self.path), ["is a file; the run directory must be a folder or not exist yet"])
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            write_text(self.path / "pipeline.yaml", dump_yaml(pipeline.dump()))
            yield

    def check(self, pipeline: Pipeline) -> None:
        """Raise ConfigError if the folder holds the run of another pipeline."""
        file = self.path / "pipeline.yaml"
        if not file.exists():
            return
        held = read_yaml(file)
        stages = [(entry.get("name"), entry.get("kind")) for entry in held.get("stages", [])]
        wanted = [(node.name, node.kind) for node in pipeline.stages]
        if held.get("name") != pipeline.name or sorted(map(str, stages)) != sorted(map(str, wanted)):
            raise ConfigError(
                str(self.path),
                [
                    f"holds a run of pipeline {held.get('name')!r} ({_list(stages)}), not of {pipeline.name!r} "
                    f"({_list(wanted)}); choose another --run-dir"
                ],
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ConfigError(
                    str(self.path), [f"process {lock.read().strip() or '?'} is running in it; wait for it to end"]
                ) from None
            except OSError:
                pass  # this file system has no locks; run without one
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    # --- one stage ---

    def folder(self, node: Node) -> Path:
        """The folder of a node."""
        return self.path / node.folder

    def done(self, node: Node) -> dict[str, Any] | None:
        """The content of a node's DONE, if the node was finished and its outputs still exist; else None."""
        record = _read_json(self.folder(node) / DONE)
        if record is None or not isinstance(record.get("outputs"), dict):
            return None
        return record if all((self.path / path).exists() for path in record["outputs"].values()) else None

    def state(self, node: Node, input_hash: str) -> State:
        """done: finished with the same hash.

        resume: begun with the same hash. changed: the folder holds something else.
        """
        record = self.done(node)
        if record and record.get("input_hash") == input_hash:
            return "done"
        folder = self.folder(node)
        started = _read_json(folder / STARTED)
        if started and started.get("input_hash") == input_hash and not (folder / DONE).exists():
            return "resume"
        return "changed" if folder.exists() and any(folder.iterdir()) else "new"

    def has_unfinished_work(self, node: Node) -> bool:
        """True if a stage was interrupted after its first checkpoint."""
        folder = self.folder(node)
        checkpoints = folder / "checkpoints"
        return not (folder / DONE).exists() and checkpoints.is_dir() and any(checkpoints.glob("step_*"))

    def begin(self, node: Node, input_hash: str, config: Mapping[str, Any], *, resume: bool) -> None:
        """Prepare the folder: empty it unless its work is resumed, then write config.yaml and STARTED."""
        folder = self.folder(node)
        if not resume:
            self.clear(node)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", dump_yaml(dict(config)))
        write_text(folder / STARTED, json.dumps({"input_hash": input_hash}) + "\n")

    def clear(self, node: Node) -> None:
        """Empty a stage's folder. DONE goes first and STARTED last, so a half-emptied folder never looks finished."""
        folder = self.folder(node)
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / STARTED).exists() and not (folder / DONE).exists():
            only_evaluation = not node.of and {item.name for item in folder.iterdir()} <= {"eval"}
            if not only_evaluation:
                raise ConfigError(
                    str(folder), ["holds files that no stage made; move them away or choose another --run-dir"]
                )
        (folder / DONE).unlink(missing_ok=True)
        for item in folder.iterdir():
            if item.name != STARTED:
                remove(item)
        (folder / STARTED).unlink(missing_ok=True)

    def forget_events(self, nodes: set[str]) -> None:
        """Remove the events of nodes that start anew from events.jsonl, and any line that a full disk cut off."""
        if not self.events.exists():
            return
        lines = self.events.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_whole(line) and json.loads(line).get("stage") not in nodes]
        if len(kept) != len(lines):
            write_text(self.events, "".join(kept))

    def finish(self, node: Node, record: Mapping[str, Any]) -> None:
        """Write DONE, the last file of a stage."""
        write_text(self.folder(node) / DONE, json.dumps(record, indent=1, default=str) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _list(stages: list[tuple[Any, Any]]) -> str:
    return ", ".join(str(name) if name == kind else f"{name}: {kind}" for name, kind in stages)
