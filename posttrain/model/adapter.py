"""Folders of LoRA adapters in peft's format, checked before any weight is loaded.

A folder with adapter_config.json and adapter_model.safetensors stands for the model that its adapters make of their
base, whose folder adapter_config.json names as base_model_name_or_path. Only JSON and the headers of weight files are
read here; posttrain.parallel.adapters loads, merges and writes.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.files import read_object
from posttrain.model.folder import read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGED = "merged"  # the folder in that of a stage for whole models that adapters of its config stand for
BASE = "base.json"  # {"mark": that of the base on which the adapters were trained}; written by us, not by peft
# Settings of peft under which an adapter is more than a change of the base's weights, or changes another base.
_MORE = ("modules_to_save", "layer_replication", "trainable_token_indices")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LOW_RANK = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_SHOWN = 3
SAMPLE_BYTES = 1 << 16


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds adapters in place of a whole model."""
    folder = Path(path).expanduser()
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(path: str | Path) -> Path:
    """The folder of the base that adapters stand on; a folder of a whole model itself."""
    folder = Path(path).expanduser()
    if not is_adapter(folder):
        return folder
    named = (read_object(folder / CONFIG) or {}).get("base_model_name_or_path")
    return Path(str(named or "")).expanduser()


def adapter_problems(path: str | Path) -> list[str]:
    """Why the adapters in a folder cannot be added to their base, one line each. The base itself is not checked."""
    folder = Path(path).expanduser()
    config = read_object(folder / CONFIG)
    if config is None:
        return [f"{CONFIG} is not a JSON object"]
    problems = [*_setting_problems(config), *_base_problems(folder, config)]
    if not (folder / WEIGHTS).is_file():
        return [*problems, f"no {WEIGHTS}; pickled weights are not loaded"]
    try:
        header = read_header(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        return [*problems, f"{WEIGHTS} cannot be read as safetensors: {error}; copy or download it again"]
    return problems or _shape_problems(header, config, base_folder(folder)) or _changed_base(folder)


def base_mark(folder: str | Path) -> str:
    """A short hash by which a base that has changed is noticed: of config.json, sizes, and samples of the weights.

    Large files are not read whole, so it takes milliseconds; a training changes every sample.
    """
    digest = hashlib.sha256()
    for path in sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")]):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, size // 2, size - SAMPLE_BYTES):
                file.seek(max(start, 0))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _changed_base(folder: Path) -> list[str]:
    mark, base = (read_object(folder / BASE) or {}).get("mark"), base_folder(folder)
    try:
        now = base_mark(base)
    except OSError:
        return []  # a fault of the base, which its own checks name
    if mark is None or mark == now:
        return []
    return [
        f"its base {str(base)!r} is not the model that the adapters were trained on, or has changed since: its weights "
        f"or config.json have the mark {now}, and {BASE} notes {mark}; set base_model_name_or_path in "
        f"{folder / CONFIG} to the folder of that model, or delete {BASE} to take this one"
    ]


def check_adapter(path: str | Path) -> None:
    """Raise CheckpointError for adapters that cannot be added to their base."""
    if problems := adapter_problems(path):
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        yield f"peft_type: got {kind}: only LORA adapters are read; merge others into a model folder with peft"
        return
    rule = "such an adapter is more than a change of weights; merge it into a model folder with peft"
    yield from (f"{key}: got {config[key]}: {rule}" for key in _MORE if config.get(key))
    if (bias := config.get("bias", "none")) != "none":
        yield f"bias: got {bias}: {rule}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        yield f"init_lora_weights: got {start}: its training changed the base too; convert it to a plain LoRA with peft"


def _base_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    named, base = config.get("base_model_name_or_path"), base_folder(folder)
    rule = f"set it in {folder / CONFIG} to the folder of the model that the adapter was trained on"
    if not named:
        yield f"base_model_name_or_path is not set; {rule}"
    elif not base.is_dir():
        yield f"base_model_name_or_path: got {named!r}: no such folder; {rule}"
    elif is_adapter(base):
        yield f"base_model_name_or_path: got {named!r}, which is an adapter itself; {rule}, merged"


def _shape_problems(header: Mapping[str, Any], config: Mapping[str, Any], base: Path) -> list[str]:
    """Modules that the base lacks or has in another size. Weights of all experts in one are checked when merging."""
    shapes: dict[str, list[int]] = {}
    for file in base.glob("*.safetensors"):
        try:
            shapes |= {name: item["shape"] for name, item in read_header(file).items()}
        except (OSError, ValueError):
            return []  # a fault of the base, which its own checks name
    problems = []
    for name, item in header.items():
        found = _LOW_RANK.fullmatch(name)
        if found is None:
            continue
        module, which = found[1].replace(".base_layer", ""), found[2]
        weight = shapes.get(f"{module}.weight", shapes.get(f"language_model.{module}.weight"))
        if weight is None and not config.get("target_parameters"):
            problems.append(f"{module}, which the base lacks")
        elif weight is not None and len(weight) == 2 and weight[which == "A"] != item["shape"][which == "A"]:
            side = "inputs" if which == "A" else "outputs"
            got, has = item["shape"][which == "A"], weight[which == "A"]
            problems.append(f"{module} with {got} {side}, of which the base has {has}")
    rest = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    rule = f"base_model_name_or_path in {CONFIG} must name the model that it was trained on"
    return [f"it adapts {'; '.join(problems[:_SHOWN])}{rest}; {rule}"] if problems else []
