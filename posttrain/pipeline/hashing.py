"""The basis of a stage: everything that its result depends on. These are config, inputs, seed, code and needed stages.

The basis is saved beside the result, so that a later run can name the differences (changes.py). Its hash shows whether
there are any. The basis names needed stages by their hashes, not by the paths of their outputs, so a run directory may
be moved. Only the content of files counts, not their dates. Files over 256 MiB (weights) are hashed by their size and
three samples of 1 MiB. Left out: installed packages other than this one, and config fields marked RESULT_STAYS.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.data import DataConfig, FilesConfig
from posttrain.config.environments import EnvironmentFunctionConfig
from posttrain.config.images import ImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.rewards import RewardFunctionConfig
from posttrain.data.files import read_records
from posttrain.data.hub import local_path
from posttrain.data.images.take import named_files
from posttrain.data.messages import RowError
from posttrain.data.pairs import parse_pair
from posttrain.data.rows import parse_row
from posttrain.errors import UserError
from posttrain.model.adapter import base_folder, is_adapter
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.inputs import data_kind, find_inputs, images_of, other_paths, paths_of, walk
from posttrain.pipeline.kinds import Rows, StageKind
from posttrain.pipeline.layers import parts_below
from posttrain.pipeline.references import has_reference

WHOLE_FILE_BYTES = 256 << 20
SAMPLE_BYTES = 1 << 20

Basis = dict[str, Any]  # JSON: kind, config, seed, inputs, stages and code; the last three hold hashes by name


def make_basis(node: Node, pipeline: Pipeline, upstream: Mapping[str, str]) -> Basis:
    """The basis of a node. upstream: the hashes of the nodes that it needs, by name."""
    return {
        "kind": node.kind,
        "config": _deciding(node.config),
        "seed": pipeline.seed,
        "inputs": _inputs(node),
        "stages": {name: upstream[name] for name in node.needs},
        "code": code_hashes(node.stage_kind),
    }


def basis_hash(basis: Basis) -> str:
    """One hash of a basis."""
    return _digest(json.dumps(basis, sort_keys=True).encode())


def input_hash(node: Node, pipeline: Pipeline, upstream: Mapping[str, str]) -> str:
    """The hash of a node's basis."""
    return basis_hash(make_basis(node, pipeline, upstream))


def marked(config: Config, mark: Mapping[str, object]) -> set[str]:
    """Key paths of the fields of a config, at any depth, that have this mark as their `json_schema_extra`."""
    return {
        f"{key}.{name}" if key else name
        for key, section in walk(config)
        for name, field in type(section).model_fields.items()
        if field.json_schema_extra == mark
    }


def _deciding(config: Config) -> dict[str, Any]:
    """The config as JSON, without the fields that do not change the result (RESULT_STAYS)."""
    data = config.model_dump(mode="json")
    for key in sorted(marked(config, RESULT_STAYS), reverse=True):  # what is in a section before the section itself
        *way, last = key.split(".")
        target: Any = data
        for part in way:
            target = target[int(part)] if isinstance(target, list) else target[part]
        del target[last]
    return data


def _inputs(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    images = images_of(node.config)
    for item in find_inputs(node.config):
        value = item.value
        if isinstance(value, ServedModelConfig):
            template = value.chat_template.path if value.chat_template is not None else None
            paths = [*_model_paths(value.path), *([template] if template is not None else [])]
        elif isinstance(value, FilesConfig):
            paths = [value.path] if isinstance(value.path, str) else value.path
        else:
            paths = _plugin_sources(value)
        found[item.key] = [path_hash(local_path(path)) for path in paths if not has_reference(path)]
        if images is not None and isinstance(value, DataConfig):
            found[item.key].append(_pictures_hash(value, data_kind(item.key, node.stage_kind), images))
    for key, path in other_paths(node.config, node.stage_kind):
        found[key] = [path_hash(Path(part).expanduser()) for part in _model_paths(path)]
    return found


def _pictures_hash(data: DataConfig, kind: Rows, images: ImagesConfig) -> str:
    """The hash of the contents of the files that rows name as their pictures.

    The rows of other stages do not exist yet. What they hold depends on those stages, which count themselves.
    """
    paths = [path for path in paths_of(data) if not has_reference(path)]
    root = None if images.root is None else Path(images.root)
    found: dict[Path, str] = {}
    for record in read_records(paths):
        with suppress(RowError):  # the stage reports it
            folder = Path(record.file).parent
            if kind == "pairs":
                pair = parse_pair(record, data)
                turns, fields = pair.prompt, pair.fields
            else:
                row = parse_row(record, "prompt" if kind == "prompt" else "supervised", data)
                turns, fields = row.messages, row.fields
            for path in named_files(turns, fields, root=root, folder=folder):
                found.setdefault(path, file_hash(path))
    return _digest("\n".join(sorted(found.values())).encode())


def _model_paths(path: str) -> list[str]:
    """The path itself, and for adapters also the folder of their base."""
    return [path, *([str(base_folder(path))] if is_adapter(path) else [])]


def _plugin_sources(plugin: RewardFunctionConfig | EnvironmentFunctionConfig) -> list[str]:
    from posttrain.scoring.plugins.requirements import environment_sources, reward_sources

    try:
        if isinstance(plugin, EnvironmentFunctionConfig):
            return [str(path) for path in environment_sources(plugin.name, plugin.args)]
        return [str(path) for path in reward_sources(plugin.name, plugin.args)]
    except (UserError, ImportError):
        return []


def path_hash(path: Path) -> str:
    """The hash of a file's content, or of the names and contents of a folder's files. Hidden files do not count."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item, path))
        return _digest("\n".join(f"{item.relative_to(path)} {file_hash(item)}" for item in files).encode())
    return file_hash(path)


def file_hash(path: Path) -> str:
    """The hash of a file's content. A large file is hashed by its size and three samples."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= WHOLE_FILE_BYTES:
            while chunk := file.read(SAMPLE_BYTES):
                digest.update(chunk)
        else:
            digest.update(str(size).encode())
            for start in (0, size // 2, size - SAMPLE_BYTES):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def code_hashes(kind: StageKind) -> dict[str, str]:
    """Hashes of the source code that a kind of stage can depend on, by part, such as posttrain/rl.

    For a stage of this package: its own folder, and each part that the table of layers lets it import. For a stage from
    outside: the whole package and the stage's own module.
    """
    own = _package(kind)
    allowed = parts_below(own) if own is not None else None
    found = {f"posttrain/{top}": text for top, text in _source_hashes().items() if allowed is None or top in allowed}
    module = kind.run.partition(":")[0]
    spec = find_spec(module)
    if own is None and spec and spec.origin:
        found[module] = file_hash(Path(spec.origin))
    return found


def _package(kind: StageKind) -> str | None:
    """The folder of this package that a kind of stage lives in; None for a stage from outside."""
    parts = kind.run.partition(":")[0].split(".")
    return parts[1] if parts[0] == "posttrain" and len(parts) > 1 else None


@cache
def _source_hashes() -> dict[str, str]:
    """The hash of each part of this package: of the paths and contents of its source files."""
    root = Path(posttrain.__file__).parent
    lines: dict[str, list[str]] = {}
    for path in sorted(item.relative_to(root) for item in root.rglob("*.py")):
        lines.setdefault(path.parts[0].removesuffix(".py"), []).append(f"{path} {file_hash(root / path)}")
    return {part: _digest("\n".join(of).encode()) for part, of in lines.items()}


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
