"""Which packages a reward's source imports that are not installed, found without executing it.

Only imports that certainly run are looked at: those at the top level of the file and of the function, and not those in
an `if`, `try` or `with`, which a plug-in writes for packages that it can do without. A file that changes `sys.path` is
not judged.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from posttrain.errors import PluginError
from posttrain.scoring.plugins.source import find_module


def check_imports(title: str, path: Path, function: str) -> None:
    """Raise PluginError if the file imports a module that cannot be found.

    title: begins the message, such as "reward 'math'". path: of a file that is valid Python. function: its name in it.
    """
    tree = ast.parse(path.read_bytes())
    if any(isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" for node in ast.walk(tree)):
        return
    bodies = [tree.body]
    bodies += [
        node.body
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in (function, "warm_up")
    ]
    for line, name in (item for body in bodies for item in _imported(body)):
        if not _exists(name, path.parent):
            raise PluginError(
                f"{title}: {path}:{line} imports {name}, which is not installed in {sys.prefix}; install the package "
                "that provides it, or remove the import"
            )


def _imported(body: Iterable[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, name of the outermost package) of each import among these statements."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from ((statement.lineno, alias.name.partition(".")[0]) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            yield statement.lineno, (statement.module or "").partition(".")[0]


def _exists(name: str, folder: Path) -> bool:
    """Whether a module can be imported by a reward file in this folder."""
    if name in sys.modules or PathFinder.find_spec(name, [str(folder)]) is not None:
        return True
    try:
        find_module(name)
    except ModuleNotFoundError:
        return False
    return True
