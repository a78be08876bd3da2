"""YAML with the scalars of version 1.2 (its core schema), on PyYAML, which reads those of 1.1.

So `1e-5` is a number, `010` is ten, and `yes`, `1:30`, `1_000` and `2024-01-01` are text. A key that appears twice is
an error, and so is `<<`, the merge key of version 1.1. What is written is read back as it was.
Source: yaml.org/spec/1.2.2, 10.3.2.
"""

import re
from typing import Any

import yaml

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


NO_MERGE = "YAML 1.2 has no merge key `<<`; write the keys out (an alias, `key: *name`, stands for a whole value)"


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (filled below)


class Dumper(yaml.SafeDumper):
    """Writes what both versions read alike: text that either would take for something else is quoted."""


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key == "<<":
            raise yaml.constructor.ConstructorError(None, None, NO_MERGE, key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
