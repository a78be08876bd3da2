"""The leaves of a config schema, and another valid value for each, for tests/test_config_leaves.py.

A leaf is a field that holds no section of its own, at any depth: `optimizer.beta1`, `systems.instructions.0.text`. A
section that may be absent (None, or an empty list) is a leaf itself as well, when it is absent.
"""

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

NUMBERS = (1, 2, 8, 16, 64, 256)  # tried where there is no number to start from


@dataclass(frozen=True)
class Leaf:
    """A field by its key path and type. `given`: what must be set for it to exist (the section that holds it)."""

    key: str
    annotation: Any
    given: Mapping[str, Any]


class NoValueError(AssertionError):
    """No other value can be made for a leaf: the type is not known here, or the schema accepts one value only."""


def find_leaves(schema: type[BaseModel], data: Any, prefix: str = "", given: Any = None) -> Iterator[Leaf]:
    """Every leaf of a schema. data: the base config in full, which says which sections are absent there."""
    for name, info in schema.model_fields.items():
        yield from _expand(f"{prefix}{name}", info.annotation, _get(data, name), dict(given or {}))


def _expand(key: str, annotation: Any, value: Any, given: dict[str, Any]) -> Iterator[Leaf]:
    annotation = _plain(annotation)
    options = _options(annotation)
    section, *others = [option for option in options if _is_section(option)] or [None]
    if section is not None and int in options:  # a number is the short form of the section
        yield Leaf(key, annotation, given)
    for other in others:  # the other forms of a section, each in a config of its own
        yield from find_leaves(other, None, f"{key}.", {**given, key: minimal(other)})
    items = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    item = _plain(items) if items is not None and _is_section(_plain(items)) else None
    if section is None and item is None:
        yield Leaf(key, annotation, given)
        return
    if not value and (item is not None or type(None) in options):
        yield Leaf(key, annotation, given)
        made = minimal(section) if section is not None else [minimal(item)]
        given = {**given, key: made}
    if section is not None:
        yield from find_leaves(section, value, f"{key}.", given)
    elif item is not None:
        yield from find_leaves(item, value[0] if value else None, f"{key}.0.", given)


def minimal(section: Any) -> dict[str, Any]:
    """The required fields of a section."""
    required = {name: info.annotation for name, info in section.model_fields.items() if info.is_required()}
    return {name: next(_candidates(_plain(annotation), None), None) for name, annotation in required.items()}


def other_values(leaf: Leaf, schema: type[BaseModel], data: Mapping[str, Any]) -> list[Any]:
    """Values that the schema accepts in place of the one in `data`: all of a Literal's, else one.

    Raises NoValueError if there is none.
    """
    current = get_at(schema.model_validate(data).model_dump(), leaf.key)
    is_choice = any(get_origin(option) is Literal for option in _options(leaf.annotation))
    found: list[Any] = []
    for value in _candidates(leaf.annotation, current):
        if value != current and (is_choice or not found) and _accepts(schema, set_at(data, leaf.key, value)):
            found.append(value)
    if not found:
        raise NoValueError(f"{leaf.key}: no valid value but {current!r} can be made for {leaf.annotation}; name one")
    return found


def _candidates(annotation: Any, current: Any) -> Iterator[Any]:
    for option in _options(annotation):
        origin = get_origin(option)
        if origin is Literal:
            yield from get_args(option)
        elif option is bool:
            yield from (False, True)
        elif option is int:
            yield from (current + 1, current * 2, current - 1) if isinstance(current, int) else NUMBERS
        elif option is float:
            yield from (current * 2, current / 2, 0.25) if isinstance(current, float) else map(float, NUMBERS)
        elif option is str:
            yield f"{current or ''}x"
        elif _is_section(option):
            yield minimal(option)
        elif origin is list:
            items = list(current) if isinstance(current, list) else []
            yield items[:-1]
            yield [*items, _first(get_args(option)[0])]
        elif origin is dict:
            yield {"x": _first(get_args(option)[1])}
        elif option is Any:
            yield 1
        elif option is type(None):
            yield None


def _first(annotation: Any) -> Any:
    return next(_candidates(_plain(annotation), None), None)


def get_at(data: Any, key: str) -> Any:
    """The value at a key path."""
    for part in key.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def set_at(data: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with another value at a key path; sections on the way are made."""
    changed = copy.deepcopy(dict(data))
    *way, last = key.split(".")
    target: Any = changed
    for part in way:
        target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value
    return changed


def _accepts(schema: type[BaseModel], data: Mapping[str, Any]) -> bool:
    try:
        schema.model_validate(data)
    except ValidationError:
        return False
    return True


def _get(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else None


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [_plain(option) for option in get_args(annotation)]
    return [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
