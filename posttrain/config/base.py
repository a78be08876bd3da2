"""The strict base of every schema, and the road from a YAML file to a validated object.

What it leaves out, on purpose: inheritance between files and environment interpolation. A file says what it means;
`key.path=value` changes a field; the resolved file is written into the run directory.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.config import JsonDict

from posttrain.config.yaml_core import Dumper, Loader
from posttrain.errors import ConfigError

NO_VARIABLES = (
    'environment variables are not read; write the value out, or give it on the command line: key.path="$NAME"'
)
# Keys of other tools whose name here is another one, or which is an option of the command.
OTHER_TOOLS = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.learning_rate"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "dtype"), "model.dtype, float32 or bfloat16"),
    **dict.fromkeys(("output_dir", "run_dir", "save_dir"), "--run-dir FOLDER"),
    **dict.fromkeys(("deepspeed", "fsdp"), "parallel, which says how the training is divided"),
    **dict.fromkeys(("model_name_or_path", "base_model"), "model.path"),
    **dict.fromkeys(("chat_template", "template"), "model.chat_template, such as {builtin: chatml}"),
    **dict.fromkeys(("datasets", "dataset", "train_file"), "data.path (of rl: prompts.path, of dpo: pairs.path)"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "max_length"),
    **dict.fromkeys(("seed", "random_seed"), "--seed NUMBER"),
    "kl_coef": "loss.reference",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
}
ConfigT = TypeVar("ConfigT", bound="Config")

# Marks of a field, given as `json_schema_extra`: what another value means for a stage that has run. A field without a
# mark decides the result, so that another value makes another result (pipeline/changes.py).
MAY_GROW: JsonDict = {"when_changed": "a larger value continues the training from its last checkpoint"}
RESULT_STAYS: JsonDict = {"when_changed": "the result stays as it is"}


class Config(BaseModel):
    """Base of all schemas: unknown keys are errors, types are not coerced, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; a syntax error becomes a `ConfigError` that names the line."""
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = str(getattr(error, "problem", None) or error)
        if "\\t" in problem:
            problem = "a tab character; YAML is indented with spaces only"
        line = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
        if "${" in line:
            problem += '; within braces or brackets a reference is quoted, as in {path: "${sft.model}"}' + (
                f"; {NO_VARIABLES}" if re.search(r"\$\{\s*(oc\.|env\b|[A-Z_]+\s*\})", line) else ""
            )
        raise ConfigError(source, [f"{where}{problem}"]) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"]) from None
    except IsADirectoryError:
        raise ConfigError(str(path), ["is a folder; give the YAML file of a config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    if path.suffix in (".jsonl", ".ndjson", ".csv"):
        raise ConfigError(str(path), ["is a file of rows; give the YAML file of a config, which names it"])
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {type(data).__name__}"
        raise ConfigError(str(path), [f"{found}, but must hold a mapping of keys to values"])
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `data` with every `key.path=value` applied; values are parsed as YAML."""
    data = _deep_copy(data)
    for override in overrides:
        key, sign, raw = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"override {override!r}", ["must have the form key.path=value"])
        target = data
        parts = key.strip().split(".")
        for part in parts[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[parts[-1]] = parse_yaml(raw, f"override {override!r}") if raw else ""
    return data


def _deep_copy(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep_copy(item) for item in value]
    return value


def validate_config(schema: type[ConfigT], data: dict[str, Any], source: str) -> ConfigT:
    """Validate `data` under `schema`; raises `ConfigError` with every problem of the file."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(source, config_problems(schema, data, error)) from None


def load_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read, override and validate one stage file."""
    return validate_config(schema, apply_overrides(read_yaml(path), overrides), str(path))


def config_problems(schema: type[Config], data: object, error: ValidationError) -> list[str]:
    """One line a problem: key path, the value got, the rule, and the nearest valid key for a typo."""
    problems = []
    for item in error.errors(include_url=False):
        location = [part for part in item["loc"] if not _is_union_tag(part)]
        key = ".".join(str(part) for part in location) or "(whole file)"
        if item["type"] == "extra_forbidden":
            problems.append(f"{key}: unknown key; {_hint(schema, location)}")
        elif item["type"] == "missing":
            problems.append(f"{key}: required, but not set")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = _value_at(data, location)
            if item["type"] in ("model_type", "model_attributes_type"):
                message = _section_rule(schema, location, value)
            elif item["type"] == "bool_type" and isinstance(value, str):
                message = "must be true or false (yes, no, on and off are text in YAML 1.2)"
            elif item["type"] == "list_type" and any(other.startswith(f"{key}: ") for other in problems):
                continue  # of another type that the key may have, whose problem was told
            shown = "" if isinstance(value, dict) else f"got {value!r}: "
            problems.append(f"{key}: {shown}{message}")
    return list(dict.fromkeys(problems))


def _hint(schema: type[BaseModel], location: Sequence[Any]) -> str:
    """What an unknown key may have been meant to be: the key of another tool, a near one, or one of another section."""
    name, known = str(location[-1]), _known_keys(schema, location[:-1])
    other = OTHER_TOOLS.get(name, "") if len(location) == 1 else ""
    if other.startswith("--"):
        return f"it is an option of the command: {other}"
    if other and re.split(r"[., ]", other)[0] in schema.model_fields:
        return f"use {other}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    deeper = [path for path in key_paths(schema) if path.endswith(f".{name}") and path.count(".") == 1]
    if name not in known and deeper and not (near and near[0] == name):
        return f"did you mean {' or '.join(map(repr, deeper[:3]))}?"
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def _section_rule(schema: type[BaseModel], location: Sequence[Any], value: object) -> str:
    """The rule for a key that got a value in place of a section, with the likeliest form of it."""
    keys = _known_keys(schema, location)
    sections = _sections_at(schema, location)
    first = [name for section in sections for name in section.model_fields if name in ("path", "name")]
    first += [name for section in sections for name, field in section.model_fields.items() if field.is_required()]
    first = ["builtin"] if "builtin" in keys and "/" not in str(value) else first
    shown = f", such as {{{first[0]}: {value}}}" if first and isinstance(value, str) else ""
    return f"must be a section of keys{shown}; its keys: {', '.join(keys)}"


def key_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The key paths of a schema, such as optimizer.learning_rate: its own keys first, then those of each section."""
    inner: list[tuple[Any, str]] = []
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        inner += [(section, f"{prefix}{name}.") for section in sections_of(field.annotation)]
    for section, before in inner:
        yield from key_paths(section, before)


def _is_union_tag(part: object) -> bool:
    """pydantic puts the name of a union's branch (`str`, `list[str]`, a model's class) into a location."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())


def _value_at(data: Any, location: Sequence[Any]) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type allows: none, one, or the branches of a union."""
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for option in get_args(annotation) for section in sections_of(option)]


def _known_keys(schema: type[BaseModel], location: Sequence[object]) -> list[str]:
    return list(dict.fromkeys(name for model in _sections_at(schema, location) for name in model.model_fields))


def _sections_at(schema: type[BaseModel], location: Sequence[object]) -> list[type[BaseModel]]:
    models = [schema]
    for part in location:
        inner = [
            section
            for model in models
            if isinstance(part, str) and part in model.model_fields
            for section in sections_of(model.model_fields[part].annotation)
        ]
        models = inner or models
    return models


def dump_yaml(config: Config | dict[str, Any]) -> str:
    """The resolved YAML of a config: every default written out."""
    data = config.model_dump(mode="json") if isinstance(config, Config) else config
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
