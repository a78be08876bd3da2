"""The run directory on disk: the pipeline to which it belongs, the state of each stage, and the lock of the run.

The files in a stage's folder show its state. STARTED holds the basis (hashing.py) of the run that was begun there.
DONE, which is written last, holds the outputs of the finished run. Every file that another process may read is written
under a temporary name and then renamed, so that no process reads half a file.
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.base import dump_yaml, read_yaml
from posttrain.errors import ConfigError
from posttrain.files import OUT_OF_SPACE, keep_lines, read_object, remove, write_text
from posttrain.pipeline.graph import Node, Pipeline

STARTED = "STARTED"
DONE = "DONE"
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Held:
    """The content of a stage's folder.

    input_hash, basis: of the run that was begun there; "" and None if there is none, or if another version of this
    package began it. finished: the run ended without an error. missing: outputs of a finished run that no longer exist.
    step: of the last checkpoint, 0 for none. has_work: there is a checkpoint or other progress.
    """

    input_hash: str = ""
    basis: dict[str, Any] | None = None
    finished: bool = False
    missing: tuple[str, ...] = ()
    step: int = 0
    has_work: bool = False

    @property
    def worth(self) -> str:
        """What would be lost with the folder, as text for the user; "" if nothing would."""
        if self.finished:
            return "a finished result"
        return f"an unfinished run at step {self.step}" if self.step else "an unfinished run" if self.has_work else ""


def is_running(run_dir: Path) -> bool:
    """True if a process is running in this run directory. False on a file system without locks."""
    try:
        with (run_dir / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class RunDir:
    """One run directory. Nothing is created before `open` is entered."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()
        self.events = self.path / "events.jsonl"
        self.summary = self.path / "summary.json"

    @contextmanager
    def open(self, pipeline: Pipeline) -> Iterator[None]:
        """Create the folder, take the lock, and write the resolved pipeline.yaml.

        Raises ConfigError if it cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            if error.errno in OUT_OF_SPACE:
                raise
            problem = f"nothing can be written there ({error.strerror}); choose another --run-dir"
            raise ConfigError(str(self.path), [problem]) from None
        with self._locked():
            write_text(self.path / "pipeline.yaml", dump_yaml(pipeline.dump()))
            yield

    def check(self, pipeline: Pipeline) -> None:
        """Raise ConfigError if the folder holds the run of a pipeline of another name. Its stages may differ."""
        file = self.path / "pipeline.yaml"
        held = read_yaml(file).get("name") if file.exists() else pipeline.name
        if held != pipeline.name:
            raise ConfigError(
                str(self.path),
                [f"holds a run of pipeline {held!r}, not of {pipeline.name!r}; choose another --run-dir"],
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / LOCK).open("a+") as lock:
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
        record = read_object(self.folder(node) / DONE)
        if record is None or not isinstance(record.get("outputs"), dict):
            return None
        return record if all((self.path / path).exists() for path in record["outputs"].values()) else None

    def held(self, node: Node) -> Held:
        """The content of the node's folder."""
        folder = self.folder(node)
        started = read_object(folder / STARTED) or {}
        done = read_object(folder / DONE)
        outputs = (done or {}).get("outputs")
        missing = [name for name, path in outputs.items() if not (self.path / path).exists()] if outputs else []
        found = [str(path.relative_to(folder)) for path in folder.glob(node.stage_kind.checkpoints)]
        step = max((int(number) for path in found for number in re.findall(r"\d+", path)[:1]), default=0)
        has_work = bool(found) or any((folder / name).exists() for name in node.stage_kind.progress)
        digest = str((done or started).get("input_hash", ""))
        return Held(digest, started.get("basis"), done is not None, tuple(missing), step, has_work)

    def begin(
        self,
        node: Node,
        input_hash: str,
        config: Mapping[str, object],
        *,
        basis: Mapping[str, object] | None,
        resume: bool,
    ) -> None:
        """Prepare the folder: empty it unless its work is continued, then write config.yaml and STARTED.

        A finished stage that is continued counts as unfinished from now on, so DONE is deleted first.
        """
        folder = self.folder(node)
        if not resume:
            self.clear(node)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE).unlink(missing_ok=True)
        self.write_config(node, config)
        write_text(folder / STARTED, json.dumps({"input_hash": input_hash, "basis": basis}) + "\n")

    def write_config(self, node: Node, config: Mapping[str, object]) -> None:
        """Write a stage's config.yaml: resolved, with real paths."""
        write_text(self.folder(node) / "config.yaml", dump_yaml(dict(config)))

    def clear(self, node: Node) -> None:
        """Empty a stage's folder.

        DONE is deleted first and STARTED last, so a half-emptied folder never looks finished.
        """
        self.check_folder(node)
        folder = self.folder(node)
        if not folder.exists():
            return
        (folder / DONE).unlink(missing_ok=True)
        for item in folder.iterdir():
            if item.name != STARTED:
                remove(item)
        (folder / STARTED).unlink(missing_ok=True)

    def check_folder(self, node: Node) -> None:
        """Raise ConfigError if the folder of a node holds files that no stage made."""
        folder = self.folder(node)
        if not folder.exists() or (folder / STARTED).exists() or (folder / DONE).exists():
            return
        names = {item.name for item in folder.iterdir()} if folder.is_dir() else {folder.name}
        if names and (node.of or not names <= {"eval"}):
            raise ConfigError(
                str(folder), ["holds files that no stage made; move them away or choose another --run-dir"]
            )

    def forget_events(self, nodes: set[str]) -> None:
        """Remove the events of nodes that start anew from events.jsonl, and any line that a full disk cut off."""
        keep_lines(self.events, lambda event: event.get("stage") not in nodes, on_bad=lambda: None)

    def finish(self, node: Node, record: Mapping[str, object]) -> None:
        """Write DONE, the last file of a stage."""
        write_text(self.folder(node) / DONE, json.dumps(record, indent=1, default=str) + "\n")
