"""Which model folder a path means: the folder itself, that of a stage, or the last model of a run."""

from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.files import read_object
from posttrain.model.adapter import base_folder, is_adapter
from posttrain.model.folder import check_folder


def served_folder(path: str) -> Path:
    """The folder of the model to serve. path: of a model folder, a run, or a stage of a run.

    Raises ConfigError if it is none of these or has no model yet, and CheckpointError for a damaged folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(path, ["there is no such folder; give a model folder or the folder of a run"])
    found = _model_in(folder)
    if is_adapter(found):
        holds = f"{found} holds adapters of {base_folder(found)}"
        raise ConfigError(path, [f"{holds}; merge them into a model folder first: posttrain merge {found} FOLDER"])
    check_folder(found)
    return found.resolve()


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
