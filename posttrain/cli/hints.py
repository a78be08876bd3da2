"""Suggests the override for a key that was given as an option: `--learning_rate 1e-5` for
`optimizer.learning_rate=1e-5`.
"""

from collections.abc import Sequence

from posttrain.config.base import key_paths
from posttrain.pipeline.kinds import KINDS, load_schema

SHOWN = 3


def override_hint(option: str, arguments: Sequence[str]) -> str:
    """One line that names the override for an unknown option; "" if no key of the stage has that name.

    option: such as --learning_rate. arguments: all words of the command line after `posttrain`. For `run` and
    `validate` the keys of all kinds of stage are searched.
    """
    command, *words = arguments or [""]
    kinds = [command] if command in KINDS else list(KINDS) if command in ("run", "validate") else []
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    keys = [key for kind in kinds for key in key_paths(load_schema(KINDS[kind])) if f".{key}".endswith(f".{name}")]
    found = list(dict.fromkeys(keys))[:SHOWN]
    if not found:
        return ""
    stage = "STAGE." if command == "run" else ""
    value = _value_of(option, words)
    return f"Keys of a config are given as KEY.PATH=VALUE: {' or '.join(f'{stage}{key}={value}' for key in found)}\n"


def _value_of(option: str, words: Sequence[str]) -> str:
    """The value of an option, from `--key=value` or from the next word; "VALUE" if there is none."""
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name == option.partition("=")[0]:
            return value if sign else next(iter(words[place + 1 : place + 2]), "VALUE")
    return "VALUE"
