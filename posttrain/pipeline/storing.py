"""Mirrors a run directory to the `storage` of its pipeline while the run goes on, and brings it back on another host.

    driver, a few times a second ──► check ──► raises what the thread has found: the run is held by another host
    thread, each LOOK_S          ──► a new checkpoint or finished stage, or INTERVAL_S are over? ──► Mirror.commit

Only the driver's host needs to reach the storage. Left out of the copy: hidden files, checkpoints that are being
written, and a ledger that is in use; every checkpoint has a copy of the ledger that belongs to it.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from posttrain.config.data import FilesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import ConfigError, StageError
from posttrain.files import read_object, write_text
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.inputs import find_inputs, other_paths
from posttrain.pipeline.plugins import plugin_files
from posttrain.pipeline.references import has_reference
from posttrain.pipeline.rundir import DONE, LOCK, RunDir
from posttrain.storage.mirror import Manifest, Mirror, Succeeded, begin, file_digest, newest_of, restore, take
from posttrain.storage.store import StorageError, Store

LOOK_S = 1.0
INTERVAL_S = 30.0
PATIENCE_S = 600.0  # how long the storage may fail before the run is ended
TRIES = 3  # to read a run directory of which files vanish meanwhile
HELD = ".storage.json"  # the run's name, and the tokens of the epochs that this folder has held
LEDGER = "ledger.sqlite"
PLACE = "give a place that this host reaches and may write to"


class Storing:
    """The mirror of one run. `check` is called by the run's own thread, and raises StageError for what was found."""

    def __init__(self, mirror: Mirror, pipeline: Pipeline, place: RunDir):
        self._mirror = mirror
        self._pipeline = pipeline
        self._place = place
        self._problem: str | None = None
        self._failing_s = 0.0
        self._inputs: dict[str, Path] | None = dict(_inputs(pipeline))  # None once they are copied
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="storage", daemon=True)

    def start(self) -> None:
        """Begin to mirror."""
        self._thread.start()

    def check(self) -> None:
        """Raise StageError if the run must not go on here."""
        if self._problem is not None:
            raise StageError(self._problem)

    def finish(self) -> str | None:
        """Mirror the last state. Returns what went wrong, if anything did."""
        self._ended.set()
        self._thread.join()
        self._failing_s = PATIENCE_S
        if self._problem is None:
            self._commit()
        return self._problem

    def _repeat(self) -> None:
        last, since = None, 0.0
        while self._problem is None:
            marks = _marks(self._pipeline, self._place)
            if marks != last or time.monotonic() - since >= INTERVAL_S:
                last, since = marks, time.monotonic()
                self._commit()
            if self._ended.wait(LOOK_S):
                return

    def _commit(self) -> None:
        try:
            for left in reversed(range(TRIES)):
                try:
                    self._mirror.commit(dict(_files(self._pipeline, self._place)), self._inputs)
                    break
                except FileNotFoundError:  # an old checkpoint was removed; its successor is there
                    if not left:
                        raise
            self._inputs, self._failing_s = None, 0.0
        except Succeeded as error:
            self._problem = (
                f"storage: {error}; this host wrote nothing there since. What it trained meanwhile is in "
                f"{self._place.path} alone; --resume continues the other run"
            )
        except (StorageError, OSError) as error:
            self._failing_s += INTERVAL_S
            if self._failing_s >= PATIENCE_S:
                self._problem = str(error)


@contextmanager
def stored(pipeline: Pipeline, place: RunDir) -> Iterator[Storing | None]:
    """Mirror a run to its storage; nothing without one.

    Raises ConfigError if the storage cannot be written to, or holds another run or a later epoch of this one.
    """
    if pipeline.storage is None:
        yield None
        return
    storing = Storing(_hold(pipeline, place, Store(pipeline.storage)), pipeline, place)
    storing.start()
    failed = True
    try:
        yield storing
        failed = False
    finally:
        problem = storing.finish()
        if problem is not None and not failed:
            raise StageError(problem)


def _hold(pipeline: Pipeline, place: RunDir, store: Store) -> Mirror:
    """Begin an epoch of the run in this folder."""
    own = read_object(place.path / HELD) or {}
    run, tokens, token = own.get("run") or secrets.token_hex(8), own.get("tokens", []), secrets.token_hex(8)
    try:
        found = newest_of(store)
        if found is not None:
            _check_own(found[1], run, tokens, uri=store.uri)
        # The new token is kept before it is used: a crash in between must not make this host a stranger to its run.
        _keep(place.path, run, [found[1].token, token] if found is not None else [token])
        if found is None:
            return begin(store, run=run, pipeline=pipeline.name, token=token)
        return take(store, *found, token=token, cwd=os.getcwd())
    except StorageError as error:
        raise ConfigError("storage", [f"{error}; {PLACE}".removeprefix("storage ")]) from None
    except Succeeded as error:
        raise ConfigError("storage", [f"got {store.uri!r}: {error}"]) from None


def _keep(folder: Path, run: str, tokens: list[str]) -> None:
    write_text(folder / HELD, json.dumps({"run": run, "tokens": tokens}) + "\n")


def _check_own(newest: Manifest, run: str, tokens: Sequence[str], *, uri: str) -> None:
    if newest.run != run:
        raise ConfigError(
            "storage",
            [f"got {uri!r}: it holds another run, of pipeline {newest.pipeline!r} on {newest.holder}; give an empty "
             f"place, or continue that run with `posttrain run --resume {uri}`"],
        )  # fmt: skip
    if newest.token not in tokens:
        raise ConfigError(
            "storage",
            [f"got {uri!r}: the run was continued on {newest.holder}; `posttrain run --resume {uri} --run-dir NEW` "
             "continues it here"],
        )  # fmt: skip


def resume_run(uri: str, run_dir: Path | None) -> Path:
    """Bring a run to this host and hold it. Returns its run directory. The run goes on with its pipeline.yaml there.

    run_dir: must not exist or be empty; None for runs/NAME. Inputs from outside of the run directory are put where they
    were, unless equal files are there. The current directory becomes that from which the run was started, since paths
    of its configs are relative to it. Raises ConfigError for what cannot be.
    """
    store = Store(uri)
    try:
        found = newest_of(store)
        if found is None:
            raise ConfigError("--resume", [f"got {uri!r}: no run is stored there"])
        place = (run_dir or Path("runs") / found[1].pipeline).expanduser().resolve()
        if place.exists() and any(place.iterdir()):
            raise ConfigError(str(place), ["is not empty; choose another --run-dir for the run that is brought here"])
        if odd := next((name for name in found[1].files if not (place / name).resolve().is_relative_to(place)), None):
            raise ConfigError("--resume", [f"got {uri!r}: its run has the file {odd!r}, outside of the run directory"])
        token = secrets.token_hex(8)
        mirror = take(store, *found, token=token)
        for _ in restore(store, mirror.manifest.files, lambda name: place / name):
            pass
        _restore_inputs(store, mirror.manifest)
    except StorageError as error:
        raise ConfigError("--resume", [f"{error}; {PLACE}"]) from None
    except Succeeded as error:
        raise ConfigError("--resume", [f"got {uri!r}: {error}"]) from None
    place.mkdir(parents=True, exist_ok=True)
    _keep(place, mirror.manifest.run, [token])
    if mirror.manifest.cwd:
        os.makedirs(mirror.manifest.cwd, exist_ok=True)
        os.chdir(mirror.manifest.cwd)
    return place


def _restore_inputs(store: Store, manifest: Manifest) -> None:
    missing = {}
    for name, (digest, size) in manifest.inputs.items():
        path = Path(name)
        if not path.exists():
            missing[name] = (digest, size)
        elif path.stat().st_size != size or file_digest(path, size) != digest:
            raise ConfigError(
                "--resume",
                [f"{path} is another file than the one that the run read; move it away, or put that file there"],
            )
    for _ in restore(store, missing, Path):
        pass


# --- what is copied ---


def _marks(pipeline: Pipeline, place: RunDir) -> set[Path]:
    """What is new when a state is worth copying at once: checkpoints and the marks of finished stages."""
    found: set[Path] = set()
    for node in pipeline.nodes.values():
        folder = place.folder(node)
        found.update(folder.glob(node.stage_kind.checkpoints), folder.glob(DONE))
    return found


def _files(pipeline: Pipeline, place: RunDir) -> Iterator[tuple[str, Path]]:
    """(path below the run directory, file) of everything that is complete."""
    partial = {folder for node in pipeline.nodes.values() for folder in _partial_checkpoints(node, place)}
    busy = {place.folder(node) for node in pipeline.nodes.values() if not (place.folder(node) / DONE).exists()}
    for path in sorted(place.path.rglob("*")):
        below = path.relative_to(place.path)
        if any(part.startswith(".") for part in below.parts) or path.name == LOCK or not path.is_file():
            continue
        if path.name.startswith(LEDGER) and (path.parent in busy or path.name != LEDGER):
            continue
        if not partial.isdisjoint(path.parents):
            continue
        yield below.as_posix(), path


def _partial_checkpoints(node: Node, place: RunDir) -> Iterator[Path]:
    """Folders of checkpoints that are not complete: their kind's pattern leads to a file that they do not have."""
    folder, parts = place.folder(node), Path(node.stage_kind.checkpoints).parts
    for found in folder.glob("/".join(parts[:2])):
        if len(parts) > 2 and found.is_dir() and not (found / Path(*parts[2:])).exists():
            yield found


def _inputs(pipeline: Pipeline) -> Iterator[tuple[str, Path]]:
    """(absolute path, file) of the models, data and plug-ins that the pipeline reads from elsewhere."""
    for node in pipeline.nodes.values():
        paths: list[str] = [path for _, path in other_paths(node.config, node.stage_kind)]
        for found in find_inputs(node.config):
            if isinstance(found.value, ServedModelConfig | FilesConfig):
                path = found.value.path
                paths += [path] if isinstance(path, str) else path
            else:
                paths += map(str, plugin_files(found.value))
        for path in paths:
            if has_reference(path):
                continue
            given = Path(path).expanduser().absolute()
            for file in [given] if given.is_file() else sorted(given.rglob("*")) if given.is_dir() else ():
                if file.is_file():
                    yield str(file), file
