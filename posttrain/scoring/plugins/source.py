"""Reads what a Python file defines without executing it: its functions, their parameters and docstrings.

In this way a reward is checked before anything runs, without the time and the side effects of an import. A name that
only execution can explain (it is the result of a call, or is imported) is reported as unknown, never as an error.
"""

import ast
import importlib.machinery
import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import PluginError


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function as it is written: its line, parameters, the first line of its docstring, whether it is async."""

    line: int
    signature: inspect.Signature
    summary: str
    is_async: bool = False


@dataclass(slots=True)
class ModuleSource:
    """The names that a file binds at its top level.

    functions: defined with def or async def. others: name -> what it is ("a class", "a constant"); none is a function.
    unknown: names bound by a call or an import. open_ended: a star import or a module `__getattr__` may bind more.
    """

    functions: dict[str, FunctionSource] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    open_ended: bool = False


def read_module(path: Path) -> ModuleSource:
    """The names that the file defines. Raises PluginError, with file and line, if it is not valid Python."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise PluginError(f"{path}:{error.lineno}: syntax error: {error.msg}") from error
    except (ValueError, OSError) as error:
        raise PluginError(f"{path}: cannot be read as Python: {error}") from error
    module = ModuleSource()
    for statement in _top_level(tree.body):
        _record(statement, module)
    module.open_ended = module.open_ended or "__getattr__" in module.functions
    return module


def find_module(name: str) -> Path | None:
    """The source file of an importable module, found without importing it or its parent packages.

    None for a module that has no source (built in or compiled). Raises ModuleNotFoundError with the missing part.
    """
    parts = name.split(".")
    locations: Sequence[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    for depth in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:depth]), locations)
        locations = spec.submodule_search_locations
        if locations is None and depth < len(parts):
            raise ModuleNotFoundError(f"{'.'.join(parts[:depth])} is a module, not a package")
    assert spec is not None
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _find_spec(name: str, locations: Sequence[str] | None) -> importlib.machinery.ModuleSpec:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, locations)
        if spec is not None:
            return spec
    raise ModuleNotFoundError(f"no module {name}")


def _top_level(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    """The statements that run when the module is executed, including those inside if, try and with."""
    for statement in body:
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _top_level(getattr(statement, inner, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _top_level(handler.body)


def _record(statement: ast.stmt, module: ModuleSource) -> None:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() if statement.decorator_list:
            module.unknown.add(statement.name)  # a decorator may change the parameters
            module.functions[statement.name] = _function(statement)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            module.functions[statement.name] = _function(statement)
        case ast.ClassDef():
            module.others[statement.name] = "a class"
        case ast.Import() | ast.ImportFrom():
            for alias in statement.names:
                if alias.name == "*":
                    module.open_ended = True
                module.unknown.add(alias.asname or alias.name.split(".")[0])
        case ast.Assign() | ast.AnnAssign() if statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for name in (node.id for node in ast.walk(target) if isinstance(node, ast.Name)):
                    _record_value(name, statement.value, module)


def _record_value(name: str, value: ast.expr, module: ModuleSource) -> None:
    match value:
        case ast.Constant():
            module.others[name] = "a constant"
        case ast.Dict() | ast.List() | ast.Tuple() | ast.Set():
            module.others[name] = f"a {type(value).__name__.lower()}"
        case ast.Lambda():
            module.functions[name] = FunctionSource(value.lineno, _signature(value.args), "")
        case _:
            module.unknown.add(name)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> FunctionSource:
    summary = (ast.get_docstring(node) or "").strip().split("\n")[0]
    return FunctionSource(node.lineno, _signature(node.args), summary, isinstance(node, ast.AsyncFunctionDef))


def _signature(arguments: ast.arguments) -> inspect.Signature:
    """The parameters as an inspect.Signature. It tells whether a parameter has a default, but not which value."""
    kinds = inspect.Parameter
    positional = [(a.arg, kinds.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    positional += [(a.arg, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        kinds(name, kind, default=kinds.empty if index < num_required else None)
        for index, (name, kind) in enumerate(positional)
    ]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)
