"""The strict base of every schema, and the road from a YAML file to a validated object.

What it leaves out, on purpose: inheritance between files and environment interpolation. A file says what it means;
`key.path=value` changes a field; the resolved file is written into the run directory.
"""

import difflib
import re
from collections.abc import Sequence
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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(str(path), [f"holds {type(data).__name__}, but must hold a mapping of keys to values"])
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
            known = _known_keys(schema, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{key}: unknown key; {hint}")
        elif item["type"] == "missing":
            problems.append(f"{key}: required, but not set")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = _value_at(data, location)
            shown = "" if isinstance(value, dict) else f"got {value!r}: "
            problems.append(f"{key}: {shown}{message}")
    return list(dict.fromkeys(problems))


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
    models = [schema]
    for part in location:
        inner = [
            section
            for model in models
            if isinstance(part, str) and part in model.model_fields
            for section in sections_of(model.model_fields[part].annotation)
        ]
        models = inner or models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def dump_yaml(config: Config | dict[str, Any]) -> str:
    """The resolved YAML of a config: every default written out."""
    data = config.model_dump(mode="json") if isinstance(config, Config) else config
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
