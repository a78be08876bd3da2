"""Which model folder a path means: the folder itself, that of a stage, or the last model of a run."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.files import read_object
from posttrain.model.adapter import is_adapter
from posttrain.model.folder import check_folder
from posttrain.pipeline.model_folders import model_folder_problems


def served_folder(path: str) -> Path:
    """The folder of the model to serve, which may hold adapters. path: of a model folder, a run, or a stage of a run.

    Raises ConfigError if it is none of these or has no model yet, and CheckpointError for a damaged folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(path, ["there is no such folder; give a model folder or the folder of a run"])
    found = _model_in(folder)
    if is_adapter(found):
        if problems := model_folder_problems(str(found)):
            raise ConfigError(path, problems)
    else:
        check_folder(found)
    return found.resolve()


@contextlib.contextmanager
def whole_model(folder: Path, dtype: str) -> Iterator[Path]:
    """The folder itself; for a folder of adapters that of the merged model, which is deleted at the end of the block.

    dtype: of the merge. Raises `CheckpointError` for adapters that do not fit their base.
    """
    if not is_adapter(folder):
        yield folder
        return
    from posttrain.parallel.adapters import merge_adapter

    with tempfile.TemporaryDirectory(prefix="posttrain-merged-") as scratch:
        yield merge_adapter(folder, dtype, target=Path(scratch) / folder.name)


def _model_in(folder: Path) -> Path:
    for found in (folder, folder / "model"):
        if (found / "config.json").is_file() or is_adapter(found):
            return found
    summary = read_object(folder / "summary.json")
    if summary is None:
        if (folder / "pipeline.yaml").is_file():
            raise ConfigError(str(folder), ["the run has no model yet: none of its stages has finished"])
        raise ConfigError(
            str(folder), ["it is neither a model folder (it has no config.json) nor a run (it has no summary.json)"]
        )
    stages = [stage for stage in summary.get("stages") or [] if isinstance(stage, dict)]
    for stage in reversed(stages):
        model = (stage.get("outputs") or {}).get("model")
        if isinstance(model, str) and (folder / model).is_dir():
            return folder / model
    names = ", ".join(f"{stage.get('name')} ({stage.get('status')})" for stage in stages) or "none"
    raise ConfigError(str(folder), [f"no stage of the run has left a model; its stages: {names}"])
