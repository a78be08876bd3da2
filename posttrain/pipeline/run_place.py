"""Whether a run may be kept in a folder: found before anything starts, and by `--dry-run` and `validate` too.

A run directory can be made and written to, and belongs to this pipeline. It is no folder of a stage, no folder of
data or of a model that the pipeline reads, and lies in none. Nothing is left behind by the check.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.data import FilesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import ConfigError
from posttrain.files import OUT_OF_SPACE
from posttrain.pipeline.graph import Pipeline
from posttrain.pipeline.inputs import find_inputs, other_paths
from posttrain.pipeline.references import has_reference
from posttrain.pipeline.rundir import DONE, STARTED, RunDir


def check_place(place: RunDir, pipeline: Pipeline) -> None:
    """Raise ConfigError if the run of this pipeline cannot be kept in the folder of `place`."""
    path = place.path
    if (problem := _problem(path) or _input_problem(path, pipeline)) is not None:
        raise ConfigError(str(path), [f"{problem}; choose another --run-dir"])
    place.check(pipeline)
    for node in pipeline.nodes.values():
        place.check_folder(node)


def _problem(path: Path) -> str | None:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        return (
            "is a file; the run directory must be a folder or not exist yet" if there == path else f"{there} is a file"
        )
    for mark in (STARTED, DONE):
        if (path / mark).is_file():
            return f"is the folder of a stage, of the run in {path.parent}"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        if error.errno not in OUT_OF_SPACE:
            return f"nothing can be written there ({error.strerror})"
    return None


def _input_problem(path: Path, pipeline: Pipeline) -> str | None:
    for key, given in _inputs(pipeline):
        read = Path(given).expanduser().resolve()
        if not read.exists():
            continue
        if path == read or (read.is_dir() and read in path.parents and not _is_run(read)):
            return f"is or lies in {given}, which {key} reads"
        if read.is_file() and read.parent == path and not (path / "pipeline.yaml").exists():
            return f"holds {given}, which {key} reads: a run has a folder of its own"
    return None


def _is_run(folder: Path) -> bool:
    return (folder / "pipeline.yaml").exists()


def _inputs(pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """(key path, path) of each model folder and data file that the pipeline reads."""
    for node in pipeline.nodes.values():
        for found in find_inputs(node.config):
            if isinstance(found.value, ServedModelConfig | FilesConfig):
                paths = found.value.path
                for path in [paths] if isinstance(paths, str) else paths:
                    if not has_reference(path):
                        yield f"{node.prefix}{found.key}.path", path
        for key, path in other_paths(node.config, node.stage_kind):
            yield f"{node.prefix}{key}", path
