"""Finds and checks the inputs that a stage's config names outside of the pipeline: models, datasets and plug-ins.

`input_problems` loads none of them. It lists a model's folder (model_folders.py), reads the first rows of a dataset and
parses the source of a plug-in. A path with `${...}` is the output of another stage, does not exist yet, and is not
checked. The stage itself reads all rows when it starts.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.config.data import DataConfig, FilesConfig
from posttrain.config.environments import WHOLE, EnvironmentConfig, EnvironmentFunctionConfig
from posttrain.config.images import ImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.rewards import RewardFunctionConfig
from posttrain.config.training import ParallelConfig
from posttrain.data.images.tiles import fitting_processor, multimodal_config
from posttrain.errors import CheckpointError, ConfigError, UserError
from posttrain.judging.config import EndpointConfig
from posttrain.model.adapter import adapter_problems, base_folder, is_adapter
from posttrain.model.adapter_start import adapted_parts, start_problems, started_lora
from posttrain.model.adapter_targets import target_problems
from posttrain.parallel.engine import lora_problems
from posttrain.pipeline.kinds import Rows, StageKind, kind_name
from posttrain.pipeline.model_folders import model_folder_problems, quantized_problems
from posttrain.pipeline.plugins import CHECKED_ROWS, plugin_problems, unfit_rows
from posttrain.pipeline.references import has_reference

SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Input:
    """A model folder, dataset or plug-in that a config names. key: key path of its section, such as `reward`."""

    key: str
    value: ServedModelConfig | FilesConfig | RewardFunctionConfig | EnvironmentFunctionConfig


def walk(config: BaseModel, key: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Every pydantic model inside a validated config with its key path, beginning with the config itself."""
    yield key, config
    for name in type(config).model_fields:
        yield from _walk_value(getattr(config, name), f"{key}.{name}" if key else name)


def _walk_value(value: object, key: str) -> Iterator[tuple[str, BaseModel]]:
    if isinstance(value, BaseModel):
        yield from walk(value, key)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _walk_value(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk_value(item, f"{key}.{index}")


def find_inputs(config: BaseModel) -> list[Input]:
    """The model folders, datasets and plug-ins that a config names, in the order of its keys."""
    found = []
    for key, value in walk(config):
        if isinstance(value, EnvironmentConfig) and value.name is not None:
            found.append(Input(key, value.functions[WHOLE]))
        elif isinstance(value, ServedModelConfig | FilesConfig | RewardFunctionConfig | EnvironmentFunctionConfig):
            found.append(Input(key, value))
    return found


def find_endpoints(config: BaseModel) -> list[tuple[str, EndpointConfig]]:
    """(key path, section) of each server that a config names."""
    return [(key, value) for key, value in walk(config) if isinstance(value, EndpointConfig)]


def _key_problems(endpoint: EndpointConfig) -> list[str]:
    name = endpoint.api_key_env
    if name is None or os.environ.get(name):
        return []
    return [f".api_key_env: got {name!r}: this environment variable is not set; export it, with the key as its value"]


def input_problems(config: BaseModel, kind: StageKind) -> list[str]:
    """One line for each problem, beginning with the key path. No model, dataset or reward is loaded."""
    images = images_of(config)
    if images is not None and images.root and not has_reference(images.root) and not Path(images.root).is_dir():
        return [f"images.root: got {images.root!r}: no such folder; give the folder below which all pictures lie"]
    problems = [f"{found.key}{line}" for found in find_inputs(config) for line in _problems(found, kind, images)]
    problems += _image_problems(config)
    problems += [f"{key}{line}" for key, endpoint in find_endpoints(config) for line in _key_problems(endpoint)]
    if not problems:
        problems += [*_row_problems(config, kind), *_mixture_problems(config), *_predictor_problems(config)]
        problems += [*_held_out_problems(config), *_adapter_problems(config)]
    missing = [(key, path) for key, path in other_paths(config, kind) if not Path(path).expanduser().exists()]
    return problems + [f"{key}: got {path!r}: no such file or folder" for key, path in missing]


def _row_problems(config: BaseModel, kind: StageKind) -> list[str]:
    """The first prompts that lack a field which a plug-in of the same config needs."""
    inputs = find_inputs(config)
    rewards = [item.value for item in inputs if isinstance(item.value, RewardFunctionConfig)]
    problems = []
    for found in inputs if rewards else []:
        value = found.value
        if isinstance(value, DataConfig) and data_kind(found.key, kind) == "prompt" and not _refers(value):
            problems += [f"{found.key}: {line}" for line in unfit_rows(value, config, rewards)[:SHOWN_ROWS]]
    return problems


def _adapter_problems(config: BaseModel) -> list[str]:
    """Where `lora` disagrees with adapters that are continued, with the model, or with the layout of the ranks."""
    model, lora = getattr(config, "model", None), getattr(config, "lora", None)
    if not isinstance(model, ServedModelConfig) or has_reference(model.path):
        return []
    images = images_of(config)
    problems = start_problems(model, lora, images) or target_problems(model, lora, images)
    parallel = getattr(config, "parallel", None)
    if problems or not isinstance(parallel, ParallelConfig):
        return problems
    trained = started_lora(model, lora, images)
    return (
        [f"parallel.expert: got {parallel.expert}{line}" for line in lora_problems(parallel, trained)]
        if trained
        else []
    )


def _mixture_problems(config: BaseModel) -> list[str]:
    """The capabilities and modalities of RL's batches that no prompt has.

    Only datasets of fewer than `CHECKED_ROWS` rows are checked.
    """
    mixture, modalities = getattr(config, "mixture", None), getattr(config, "modalities", None)
    data = getattr(config, "prompts", None)
    if not (mixture or modalities) or not isinstance(data, DataConfig) or _refers(data):
        return []
    from posttrain.data.images.section import passing_reader
    from posttrain.data.rows import load_rows
    from posttrain.rl.prompts.quotas import mixture_shares

    with passing_reader(images_of(config)) as reader:
        rows = load_rows(data, kind="prompt", limit=CHECKED_ROWS, images=reader)
    if len(rows) == CHECKED_ROWS:
        return []
    try:
        mixture_shares(rows, mixture or {}, "prompt", modalities=modalities)
    except ConfigError as error:
        return [f"{error.source}.{problem}" for problem in error.problems]
    return []


def _predictor_problems(config: BaseModel) -> list[str]:
    """The first prompt that lacks the field by which RL's selection predicts difficulty."""
    selection, data = getattr(config, "selection", None), getattr(config, "prompts", None)
    predictor = getattr(selection, "predictor", None)
    if predictor is None or not isinstance(data, DataConfig) or _refers(data):
        return []
    from posttrain.data.rows import load_rows
    from posttrain.rl.prompts.beliefs import strata_of

    try:
        strata_of(load_rows(data, kind="prompt", limit=CHECKED_ROWS), predictor)
    except ConfigError as error:
        return [f"selection.predictor: {problem}" for problem in error.problems]
    return []


def _held_out_problems(config: BaseModel) -> list[str]:
    """The problem if holding out rows would leave a small dataset without any row to train on."""
    held_out, data = getattr(config, "held_out", None), [item.value for item in find_inputs(config)]
    known = next((value for value in data if isinstance(value, DataConfig) and not _refers(value)), None)
    if held_out is None or known is None:
        return []
    from posttrain.data.held_out import share_problem

    return list(filter(None, [share_problem(held_out, known)]))


def paths_of(data: FilesConfig) -> list[str]:
    """The paths of a dataset as a list."""
    return [data.path] if isinstance(data.path, str) else list(data.path)


def _refers(data: FilesConfig) -> bool:
    return any(map(has_reference, paths_of(data)))


def other_paths(config: BaseModel, kind: StageKind) -> list[tuple[str, str]]:
    """(key path, path) of the other files that a stage reads, except outputs of earlier stages."""
    return [(key, value) for key, value in _texts(config, kind.paths) if not has_reference(value)]


def _texts(config: BaseModel, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if isinstance(value, str):
            yield key, value


def images_of(config: BaseModel) -> ImagesConfig | None:
    """The section of a config that says where pictures are; None for a stage that takes none."""
    images = getattr(config, "images", None)
    return images if isinstance(images, ImagesConfig) else None


def _image_problems(config: BaseModel) -> list[str]:
    """The problem if a stage is to take pictures and its model takes none, or has another model's processor."""
    model = getattr(config, "model", None) or getattr(config, "judge", None)  # of the filter
    if images_of(config) is None or not isinstance(model, ServedModelConfig) or has_reference(model.path):
        return []
    folder = base_folder(model.path)
    if not (folder / "config.json").is_file():
        return []  # _problems says so
    try:
        multimodal_config(folder)
    except CheckpointError as error:
        return [f"images: {error}; or remove images"]
    try:
        fitting_processor(folder)
    except CheckpointError as error:
        return [f"images: {error}"]
    if is_adapter(model.path) and not adapter_problems(model.path) and not adapted_parts(model.path):
        return [
            f"images: got the adapters {model.path!r}, which were trained on the text model alone and stand for a "
            "model without a vision encoder; remove images, or give a whole model or adapters trained with images"
        ]
    return []


def _problems(found: Input, kind: StageKind, images: ImagesConfig | None) -> list[str]:
    value = found.value
    if isinstance(value, ServedModelConfig):
        lines: list[str] = []
        if not has_reference(value.path):
            lines = [f".path: {line}" for line in model_folder_problems(value.path) or quantized_problems(value)]
        template = value.chat_template.path if value.chat_template is not None else None
        if template is not None and not Path(template).is_file():
            lines.append(f".chat_template.path: got {template!r}: no such file; give the file of a Jinja chat template")
        return lines
    if isinstance(value, RewardFunctionConfig | EnvironmentFunctionConfig):
        return plugin_problems(value)
    paths = [value.path] if isinstance(value.path, str) else value.path
    if any(has_reference(path) for path in paths):
        value = value.model_copy(update={"path": [path for path in paths if not has_reference(path)]})
    if not value.path:
        return []
    rows = data_kind(found.key, kind)
    return [f".path: {line}" for line in data_problems(value, rows, kind_name(kind), images=images)]


def data_kind(key: str, kind: StageKind) -> Rows:
    """The kind of rows that the dataset at a key path must hold. Indices of a list in the key path are ignored."""
    return kind.data[".".join(part for part in key.split(".") if not part.isdigit())]


def data_problems(data: FilesConfig, rows: Rows, stage: str | None, *, images: ImagesConfig | None = None) -> list[str]:
    """Problems in the first rows of a dataset that `stage` reads, one line each.

    rows: the kind of rows that the dataset must hold. For "any", only whether it can be read is checked. images: where
    the pictures of rows are; None for a stage that takes none.
    """
    if rows == "any" or not isinstance(data, DataConfig):
        return _unreadable(data)
    from posttrain.data.images.section import passing_reader

    if rows == "pairs":
        from posttrain.data.pairs import check_pairs

        with passing_reader(images) as reader:
            return check_pairs(data, CHECKED_ROWS, stage=stage, images=reader)
    from posttrain.data.rows import check_data

    with passing_reader(images) as reader:
        return check_data(data, rows, CHECKED_ROWS, stage=stage, images=reader)


def _unreadable(data: FilesConfig) -> list[str]:
    from posttrain.data.files import read_records

    paths = [data.path] if isinstance(data.path, str) else data.path
    try:
        next(read_records(paths), None)
    except UserError as error:
        return str(error).splitlines()
    return []
