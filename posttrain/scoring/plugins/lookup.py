"""Plug-ins by name: an entry point of a group, a dotted path, or a file and a function.

There are two kinds, rewards and environments. `check_reward` and `check_environment` are what validation calls: quick,
nothing is imported or executed. `load_reward` imports, so it belongs in a process that may be killed. Nothing here runs
a plug-in: that is done in `scoring/pool/` and `episodes/`.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from posttrain.errors import PluginError
from posttrain.scoring.plugins.commands import AGENT, agent_problem
from posttrain.scoring.plugins.foreign import how_to_wrap
from posttrain.scoring.plugins.imports import check_imports
from posttrain.scoring.plugins.interpreter import check_python, find_in
from posttrain.scoring.plugins.source import find_module, read_module
from posttrain.scoring.plugins.target import RewardFunction, Target, bind, import_target

_COMBINING = "posttrain.rewards.combine"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of plug-in. what: its name in messages. group: of its entry points. parameters: given to it by place."""

    what: str
    group: str
    parameters: tuple[str, ...]


REWARD = Kind("reward", "posttrain.rewards", ("rollout", "row"))
ENVIRONMENT = Kind("environment", "posttrain.environments", ("session", "row"))


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """A reward function by name, and keyword arguments for it (JSON values). python: the interpreter that runs it; ""
    for this one."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    python: str = ""

    @classmethod
    def of(cls, value: "str | RewardSpec | Mapping[str, Any]") -> "RewardSpec":
        """A RewardSpec from the value in a config: a name, or a mapping with `name` and, if wanted, `args`."""
        if isinstance(value, RewardSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or set(value) - {"name", "args"}:
            raise PluginError(f"reward is {value!r}; give a name, or a mapping with name and args")
        args = value.get("args") or {}
        if not isinstance(args, Mapping):
            raise PluginError(f"reward {value['name']}: args is {args!r}; give a mapping of keyword arguments")
        return cls(value["name"], dict(args))


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One registered plug-in: its name, `module:function`, and the first line of its docstring."""

    name: str
    where: str
    summary: str


def load_reward(name: str, args: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward function of that name, imported, with `args` bound to it.

    name: an entry point of group `posttrain.rewards`, `package.module:function`, `package.module.function` or
    `path/to/file.py:function`. Raises PluginError if it cannot be found, imported, or called with (rollout, row).
    """
    target = resolve(name)
    function = import_target(target)[1]
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a compiled function may have no signature
        signature = None
    if signature is not None:
        _check_call(str(target), signature, args or {}, parameters=REWARD.parameters)
    return bind(function, args or {})


def check_reward(name: str, args: Mapping[str, Any] | None = None, *, python: str = "") -> None:
    """Raise PluginError unless the reward exists and can be called. No code of the reward is executed.

    python: the interpreter in which it will run; "" for this one.
    """
    target = resolve(name)
    _check_source(f"reward {name!r}", name, target, parameters=REWARD.parameters, args=args or {}, python=python)
    for inner in inner_rewards(RewardSpec(name, args or {})):
        check_reward(inner.name, inner.args)


def check_environment(name: str, args: Mapping[str, Any] | None = None, *, python: str = "") -> None:
    """Raise PluginError unless the environment exists, is an async function and can be called. Executes nothing.

    python: as in `check_reward`.
    """
    target = resolve(name, ENVIRONMENT)
    title = f"environment {name!r}"
    if str(target) == AGENT and not (args or {}).get("command"):  # a function lacks an argument; this is plainer
        raise PluginError(f"environment agent: args.{agent_problem(args or {})}")
    _check_source(title, name, target, parameters=ENVIRONMENT.parameters, args=args or {}, python=python)
    path = _file_in(title, name, target, python=python)
    function = read_module(path).functions.get(target.function) if path else None
    if path and function and not function.is_async and target.function not in read_module(path).unknown:
        raise PluginError(f"{path}:{function.line}: {title} is a plain function; write async def {target.function}")
    if str(target) == AGENT and (problem := agent_problem(args or {})):
        raise PluginError(f"environment agent: args.{problem}")


def check_function(name: str, what: str, parameters: Sequence[str]) -> None:
    """Raises PluginError unless `name` is a function that can be called with so many arguments. Executes nothing.

    name: `package.module:function` or `path/to/file.py:function`. what: what it is for, to begin a message with.
    """
    target = resolve_function(name, what)
    _check_source(f"{what} {name!r}", name, target, parameters=parameters, args={})


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Import the function of that name. Raises PluginError if that fails."""
    return import_target(resolve_function(name, what), what)[1]


def resolve_function(name: str, what: str) -> Target:
    """Which module or file, and which function in it. Does not look inside; raises PluginError."""
    if ".py:" in name or name.endswith(".py"):
        return _resolve_file(name, what)
    module, _, function = name.partition(":")
    if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Target(module, function)
    raise PluginError(f"{what} {name!r} is not known; write package.module:function or path/to/file.py:function")


def function_file(target: Target) -> Path | None:
    """The source file of a target; None where there is none in this interpreter."""
    try:
        return Path(target.path) if target.path else find_module(target.module)
    except ModuleNotFoundError:  # of a plug-in that runs in another one
        return None


def _check_source(
    title: str,
    name: str,
    target: Target,
    *,
    parameters: Sequence[str],
    args: Mapping[str, Any],
    python: str = "",
) -> None:
    """Raise PluginError unless the target's source defines the function, and it can be called with these arguments.

    title: begins a message, as "reward 'math'". parameters: given by place. args: given by name.
    python: the interpreter in which it runs.
    """
    if python:
        check_python(python)
    path = _file_in(title, name, target, python=python)
    if path is None:
        if python:
            return
        # A compiled module can only be checked by importing it.
        import_target(target, title.partition(" ")[0])
        return
    module = read_module(path)
    function = module.functions.get(target.function)
    if function is not None:
        if target.function not in module.unknown:
            _check_call(
                f"{path}:{function.line}", function.signature, args, name=target.function, parameters=parameters
            )
    elif target.function in module.others:
        raise PluginError(f"{title}: {target.function} in {path} is {module.others[target.function]}, not a function")
    elif target.function not in module.unknown and not module.open_ended:
        public = [other for other in module.functions if not other.startswith("_")]
        hint = _did_you_mean(target.function, public)
        there = ", ".join(public) or "none"
        raise PluginError(f"{title}: no function {target.function!r} in {path}{hint}; functions there: {there}")
    if not python:
        check_imports(title, path, target.function)


def _file_in(title: str, name: str, target: Target, *, python: str) -> Path | None:
    """The source file of a target, as the interpreter that runs it sees it. Raises PluginError for a missing module."""
    if target.path:
        return Path(target.path)
    if not python:
        return _module_file(title, name, target)
    path = find_in(python, target.module)
    if path is None:
        raise PluginError(f"{title}: {python} has no module {target.module!r}")
    return path if path.suffix == ".py" else None


def inner_rewards(spec: RewardSpec) -> list[RewardSpec]:
    """The rewards that a combining reward calls; any other reward has none. Raises PluginError if `args` is wrong."""
    return combined_rewards(spec.args) if resolve(spec.name).module == _COMBINING else []


def combined_rewards(args: Mapping[str, Any]) -> list[RewardSpec]:
    """The rewards that the arguments of a combining reward name. Raises PluginError if the arguments are wrong."""
    return _of_system(args) if "verifiers" in args else _of_mapping(args)


def _of_system(args: Mapping[str, Any]) -> list[RewardSpec]:
    verifiers = args.get("verifiers")
    if not isinstance(verifiers, Mapping):
        raise PluginError(f"verifiers is {verifiers!r}; give a mapping of system instructions (see by_system)")
    return [RewardSpec.of(args.get("reward", ""))] + [
        RewardSpec.of({key: item for key, item in value.items() if key != "weight"}) for value in verifiers.values()
    ]


def _of_mapping(args: Mapping[str, Any]) -> list[RewardSpec]:
    """The rewards in `rewards`: where a value holds a weight, its key is the reward; else the value is."""
    rewards = args.get("rewards")
    if not isinstance(rewards, Mapping) or not rewards:
        raise PluginError(f"rewards is {rewards!r}; give a mapping (see the rewards weighted_sum and by_capability)")
    inner = []
    for key, value in rewards.items():
        weighted = isinstance(value, Mapping) and "weight" in value
        if weighted or isinstance(value, int | float):
            inner.append(RewardSpec(key, value.get("args") or {} if isinstance(value, Mapping) else {}))
        else:
            inner.append(RewardSpec.of(value))
    return inner


def list_plugins(kind: Kind) -> list[PluginInfo]:
    """Every registered plug-in, by name. One whose source is missing is listed with the reason as its summary."""
    found = []
    for name, target in sorted(_registered(kind).items()):
        try:
            path = _module_file(f"{kind.what} {name!r}", name, target)
            function = read_module(path).functions.get(target.function) if path else None
            summary = function.summary if function else ""
        except PluginError as error:
            summary = f"broken: {error}"
        found.append(PluginInfo(name, str(target), summary))
    return found


def resolve(name: str, kind: Kind = REWARD) -> Target:
    """Which module or file, and which function in it, a name means. Does not look inside; raises PluginError."""
    if not isinstance(name, str) or not name.strip():
        raise PluginError(f"{kind.what} is {name!r}; give a name, package.module:function or path/to/file.py:function")
    if ".py:" in name or name.endswith(".py"):
        return _resolve_file(name, kind.what)
    registered = _registered(kind)
    if name in registered:
        return registered[name]
    module, _, function = name.partition(":") if ":" in name else name.rpartition(".")
    if module and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Target(module, function)
    hint = _did_you_mean(name, list(registered))
    known = ", ".join(sorted(registered)) or "none (is the package installed?)"
    raise PluginError(
        f"{kind.what} {name!r} is not known{hint}; known: {known}; "
        "your own: package.module:function or path/to/file.py:function"
    )


def _resolve_file(name: str, what: str = "reward") -> Target:
    file, _, function = name.rpartition(":")
    if not file:
        file, function = name, ""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"{what} {name!r}: there is no file {path}")
    if not function:
        functions = [other for other in read_module(path).functions if not other.startswith("_")]
        example = f"{file}:{functions[0]}" if functions else f"{file}:function"
        program = f"; a program is run by the environment agent, args.command=[python, {file}]"
        program = program if what == ENVIRONMENT.what else ""
        raise PluginError(f"{what} {name!r}: name the function too, as in {example}{program}")
    if not function.isidentifier():
        raise PluginError(f"{what} {name!r}: {function!r} is not a function's name; write path/to/file.py:function")
    return Target(path.stem, function, str(path))


def _registered(kind: Kind) -> Mapping[str, Target]:
    return _registered_on(tuple(sys.path), kind)


@cache
def _registered_on(path: tuple[str, ...], kind: Kind) -> Mapping[str, Target]:
    """What the packages on a module search path register. Reading about all of them takes tens of milliseconds."""
    return {point.name: Target(point.module, point.attr) for point in metadata.entry_points(group=kind.group)}


def _module_file(title: str, name: str, target: Target) -> Path | None:
    try:
        return find_module(target.module)
    except ModuleNotFoundError as error:
        kind = next((kind for kind in (REWARD, ENVIRONMENT) if title.startswith(kind.what)), None)
        registered = [] if kind is None else sorted(_registered(kind))
        hint = _did_you_mean(name, registered)
        known = f"; known: {', '.join(registered)}" if registered else ""
        raise PluginError(f"{title}: {error}{hint}{known}") from error


def _check_call(
    where: str,
    signature: inspect.Signature,
    args: Mapping[str, Any],
    *,
    name: str = "",
    parameters: Sequence[str],
) -> None:
    if parameters == REWARD.parameters and (wrap := how_to_wrap(name or where.rpartition(":")[2], signature)):
        raise PluginError(f"{where}: {name}{signature}: {wrap}")
    try:
        signature.bind(*parameters, **args)
    except TypeError as error:
        call = "(" + ", ".join([*parameters, *(f"{key}=..." for key in args)]) + ")"
        raise PluginError(f"{where}: {name}{signature} cannot be called with {call}: {error}") from error


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
