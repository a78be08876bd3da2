"""Which fields of a row a plug-in needs, read from its source without executing it, and which rows lack them.

A module declares the fields beside its functions, by the name of each function:

    REQUIRES = {"exact_match": ["answer"], "puzzles": ["answer|numbers"]}

Each entry names a field of the row (`answer`, or another column), or several fields of which the row must have one.
What a field must hold is not declared; the plug-in checks that when it is called.
"""

import ast
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from posttrain.errors import DataError, PluginError
from posttrain.records import Row
from posttrain.scoring.plugins.commands import command_files
from posttrain.scoring.plugins.lookup import (
    ENVIRONMENT,
    REWARD,
    Kind,
    RewardSpec,
    function_file,
    inner_rewards,
    resolve,
)

MAX_SHOWN = 5
_DEFAULT = "default"


def required_fields(spec: RewardSpec, capability: str) -> list[str]:
    """The fields that rows of a capability must have for the reward, and for the rewards that it combines."""
    target = resolve(spec.name)
    needed = _declared(function_file(target), target.function)
    inner = inner_rewards(spec)
    if inner and target.function == "by_capability":
        rewards = spec.args["rewards"]
        choice = rewards.get(capability, rewards.get(_DEFAULT))
        if choice is None:
            raise PluginError(
                f"reward {spec.name!r}: no reward for capability {capability!r}; there are: {', '.join(rewards)}"
            )
        inner = [RewardSpec.of(choice)]
    for other in inner:
        needed += required_fields(other, capability)
    return list(dict.fromkeys(needed))


def environment_fields(name: str) -> list[str]:
    """The fields that rows must have for the environment."""
    target = resolve(name, ENVIRONMENT)
    return _declared(function_file(target), target.function)


def missing_fields(
    spec: RewardSpec, rows: Iterable[Row], given: Collection[str] = (), *, kind: Kind = REWARD
) -> Iterator[str]:
    """One line for each row that lacks a field which the plug-in needs and which no argument supplies.

    spec: of the reward, or of the environment if `kind` says so. Raises PluginError for a plug-in that is wrong itself.
    """
    of_environment = kind is ENVIRONMENT
    needed = cache(
        lambda capability: environment_fields(spec.name) if of_environment else required_fields(spec, capability)
    )
    for row in rows:
        for entry in needed(row.capability):
            if not any(name in given or _has(row, name) for name in entry.split("|")):
                names = " or ".join(repr(name) for name in entry.split("|"))
                yield f"row {row.id!r}: no {names}, which {kind.what} {spec.name!r} needs"


def check_fields(spec: RewardSpec, rows: Iterable[Row], given: Collection[str] = (), *, kind: Kind = REWARD) -> None:
    """Raise DataError if rows lack a field that the plug-in needs. It names the first such rows and counts the rest."""
    problems = missing_fields(spec, rows, given, kind=kind)
    if shown := list(islice(problems, MAX_SHOWN)):
        rest = sum(1 for _ in problems)
        raise DataError("\n".join([*shown, *([f"and {rest} more such rows"] if rest else [])]))


def reward_sources(name: str, args: dict | None = None) -> list[Path]:
    """The source files of a reward and of the rewards that it combines. A compiled reward has no source file."""
    spec = RewardSpec(name, args or {})
    own = function_file(resolve(name))
    inner = [path for other in inner_rewards(spec) for path in reward_sources(other.name, dict(other.args))]
    return [*([own] if own else []), *inner]


def environment_sources(name: str, args: dict | None = None) -> list[Path]:
    """The source file of an environment, and the files that its command names. A compiled one has none."""
    own = function_file(resolve(name, ENVIRONMENT))
    return [*([own] if own else []), *command_files((args or {}).get("command"))]


def _has(row: Row, name: str) -> bool:
    return (row.answer if name == "answer" else row.fields.get(name)) is not None


def _declared(path: Path | None, function: str) -> list[str]:
    for statement in ast.parse(path.read_bytes()).body if path else []:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "REQUIRES" for target in targets):
                return _entries(path, statement.value, function)
    return []


def _entries(path: Path | None, value: ast.expr, function: str) -> list[str]:
    try:
        entries = ast.literal_eval(value).get(function, [])
    except (ValueError, AttributeError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise PluginError(
            f'{path}:{value.lineno}: REQUIRES must be written out, as in {{"{function}": ["answer"]}}: a mapping of '
            "a function's name to a list of fields"
        )
    return entries
