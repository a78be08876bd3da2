"""References such as `${stage.output}`: find them in a config, replace them by paths, and order stages by them.

Everything here works on plain YAML values and knows nothing about stages.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PATTERN = re.compile(r"\$\{([^}]*)\}")
_REFERENCE = re.compile(r"^([A-Za-z][\w-]*)\.([A-Za-z]\w*)$")


@dataclass(frozen=True, slots=True)
class Reference:
    """One `${stage.output}`. key: key path of the text that holds it. stage: "" if the text does not have that form."""

    key: str
    text: str
    stage: str = ""
    output: str = ""


def find_references(value: object, key: str = "") -> Iterator[Reference]:
    """Every reference in a YAML value, in order."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from find_references(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from find_references(item, f"{key}.{index}")
    elif isinstance(value, str):
        for found in _PATTERN.finditer(value):
            match = _REFERENCE.match(found[1].strip())
            yield Reference(key, found[0], *(match.groups() if match else ()))


def replace_references(value: object, replace: Callable[[str, str], str]) -> Any:
    """The value with each `${stage.output}` replaced by `replace(stage, output)`."""
    if isinstance(value, Mapping):
        return {name: replace_references(item, replace) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_references(item, replace) for item in value]
    if not isinstance(value, str):
        return value

    def one(found: re.Match[str]) -> str:
        match = _REFERENCE.match(found[1].strip())
        return replace(match[1], match[2]) if match else found[0]

    return _PATTERN.sub(one, value)


def has_reference(text: str) -> bool:
    """True if the text holds a `${...}`, so that its value is unknown until another stage has run."""
    return "${" in text


def find_cycle(needs: Mapping[str, Sequence[str]]) -> list[str] | None:
    """The names along one cycle, with the first repeated at the end; None if there is no cycle."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return None
        for other in needs.get(name, ()):
            found = visit(other, [*path, name])
            if found:
                return found
        finished.add(name)
        return None

    for name in needs:
        found = visit(name, [])
        if found:
            return found
    return None


def topological(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The names in an order in which each comes after what it needs, and otherwise as given. There must be no cycle."""
    order: list[str] = []

    def place(name: str) -> None:
        if name not in order:
            for other in needs[name]:
                place(other)
            order.append(name)

    for name in needs:
        place(name)
    return order
