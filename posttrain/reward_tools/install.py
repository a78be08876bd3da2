"""Makes an interpreter of its own for a plug-in: a venv with msgspec and the packages that the plug-in's file names.

PACKAGES = ["reasoning-gym==0.1.25"]
"""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from posttrain.errors import PluginError
from posttrain.scoring.plugins.interpreter import check_python
from posttrain.scoring.plugins.source import find_module

_ADAPTERS = "posttrain.environments"


def install(name: str, folder: Path | None = None) -> Path:
    """Make the interpreter, or add what it lacks. Returns its path.

    name: the file of a plug-in, or an adapter such as reasoning_gym. folder: of the venv; None means .venv-NAME. Raises
    PluginError if the file names no packages, or they cannot be installed.
    """
    path = _file_of(name)
    packages = _packages(path)
    folder = folder or Path(f".venv-{path.stem}")
    python = folder / "bin" / "python"
    if not python.exists():
        _run("a new interpreter cannot be made", sys.executable, "-m", "venv", str(folder))
    wanted = [f"msgspec=={importlib.metadata.version('msgspec')}", *packages]
    _run(f"{', '.join(wanted)} cannot be installed", str(python), "-m", "pip", "install", "--quiet", *wanted)
    check_python(str(python))
    return python


def _file_of(name: str) -> Path:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PluginError(f"{name}: there is no such file")
        return Path(name)
    try:
        found = find_module(f"{_ADAPTERS}.{name}") if name.isidentifier() else None
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise PluginError(
            f"{name!r} is no adapter and no file; write path/to/file.py, or one of: {', '.join(adapters())}"
        )
    return found


def adapters() -> list[str]:
    """The built-in modules that name packages."""
    package = find_module(_ADAPTERS)
    files = sorted(package.parent.glob("[a-z]*.py")) if package is not None else []
    return [path.stem for path in files if _written(path) is not None]


def _packages(path: Path) -> list[str]:
    packages = _written(path)
    if not isinstance(packages, list) or not packages or not all(isinstance(item, str) for item in packages):
        raise PluginError(f'{path}: it names no packages; write PACKAGES = ["name==version", ...] at its top level')
    return packages


def _written(path: Path) -> object:
    """The value of PACKAGES in a file; None if there is none that is written out."""
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and any(ast.unparse(item) == "PACKAGES" for item in statement.targets):
            try:
                return ast.literal_eval(statement.value)
            except ValueError:
                return None
    return None


def _run(problem: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise PluginError(f"{problem}: {' '.join(words)[:600] or f'exit code {done.returncode}'}")
