"""Where a reward function is (a module or file, and its name in it), and how it is imported.

Reward processes import this module, so it is small and they start fast. `lookup.py` finds the target for a name.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from posttrain.errors import PluginError
from posttrain.records import RewardResult, Rollout, Row

Reward = float | int | bool | RewardResult
RewardFunction = Callable[[Rollout, Row], Reward | Awaitable[Reward]]


@dataclass(frozen=True, slots=True)
class Target:
    """A function `function` in module `module`, or in the file `path` where that is not None."""

    module: str
    function: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.path or self.module}:{self.function}"


def import_target(target: Target, what: str = "reward") -> tuple[ModuleType, RewardFunction]:
    """Import the target's module and return it with the function.

    what: the purpose of the function, with which an error message begins. Raises PluginError if the import raises an
    exception, with its message and line, or if the name is not that of a function.
    """
    try:
        module = _import_file(target.path) if target.path else importlib.import_module(target.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in may well call sys.exit() while it is imported
        raise PluginError(f"{what} {target}: importing it failed: {describe(error)}") from error
    if not hasattr(module, target.function):
        raise PluginError(f"{what} {target}: there is no {target.function!r} in it")
    function: Any = getattr(module, target.function)
    if not callable(function):
        raise PluginError(f"{what} {target}: it is a {type(function).__name__}, not a function")
    return module, cast(RewardFunction, function)


def bind(function: RewardFunction, args: Mapping[str, object]) -> RewardFunction:
    """The function, which will get `args` as keyword arguments at every call."""
    return functools.partial(function, **args) if args else function


def warm(module: ModuleType, args: Mapping[str, object]) -> None:
    """Call the module's `warm_up()` if there is one. If it takes parameters, it is called with the reward's `args`."""
    warm_up = getattr(module, "warm_up", None)
    if callable(warm_up):
        warm_up(**(args if inspect.signature(warm_up).parameters else {}))


def describe(error: BaseException) -> str:
    """The exception as `Type: message (file:line)`, with the line that raised it. Long messages are cut."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:500]}{where}"


def _import_file(path: str) -> ModuleType:
    """Execute the file as a module. Its folder is added at the end of sys.path, so that the file can import its
    neighbours, and these cannot shadow the standard library."""
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = "posttrain_reward_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
