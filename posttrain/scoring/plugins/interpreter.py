"""Another Python interpreter, in which a plug-in runs because its packages do not fit beside this package's own.

    this process ── pipe, MessagePack ──► OTHER/python -m posttrain.scoring.pool.reward_process | ...environment_process

What runs there is the same program as in this interpreter. Of third parties it needs msgspec alone: neither torch nor
Ray nor pydantic. The other interpreter sees the source of this package through a folder of links, and nothing else of
this interpreter's packages. `posttrain environments install` makes such an interpreter.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
from functools import cache
from pathlib import Path

import posttrain
from posttrain.errors import PluginError

OLDEST = (3, 11)
_PROBE_S = 60.0
_PROBE = """
import importlib.util, json, sys
found = {"version": sys.version_info[:3], "msgspec": importlib.util.find_spec("msgspec") is not None}
print(json.dumps(found))
"""
_FIND = """
import importlib.util, json, sys
spec = importlib.util.find_spec(sys.argv[1])
print(json.dumps(spec.origin if spec else None))
"""


def check_python(python: str) -> None:
    """Raise PluginError unless a plug-in can run in this interpreter."""
    _checked(python, _changed(python))


def find_in(python: str, module: str) -> Path | None:
    """The source file of a module in the other interpreter; None if it has no such module. Raises PluginError."""
    check_python(python)
    try:
        origin = json.loads(_run(python, _FIND, module))
    except PluginError:  # a package on the way to it cannot be imported
        return None
    return Path(origin) if origin else None


def client_environment() -> dict[str, str]:
    """The variables of a process of the other interpreter: those of this one, with the folder of links as its path."""
    foreign = ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {**{key: value for key, value in os.environ.items() if key not in foreign}, "PYTHONPATH": str(client_path())}


@cache
def client_path() -> Path:
    """A folder that holds nothing but the package `posttrain`, as links into this installation."""
    package = Path(posttrain.__file__).parent
    links = {item.name: item for item in package.iterdir() if item.name != "__pycache__"}
    for name in ("rewards", "pipelines", "configs"):  # beside the package in a checkout, in it when installed
        spec = importlib.util.find_spec(f"posttrain.{name}")
        if spec is not None and spec.submodule_search_locations:
            links[name] = Path(next(iter(spec.submodule_search_locations)))
    listed = json.dumps(sorted((name, str(path)) for name, path in links.items()))
    key = hashlib.sha256(listed.encode()).hexdigest()[:16]
    given = os.environ.get("POSTTRAIN_CACHE")
    root = (Path(given) if given else Path.home() / ".cache" / "posttrain") / "client" / key
    folder = root / "posttrain"
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in links.items():
        place = folder / name
        if not place.is_symlink():
            aside = folder / f".{name}.{os.getpid()}"
            aside.symlink_to(path)
            aside.replace(place)
    return root


def _changed(python: str) -> float:
    path = Path(python).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise PluginError(
            f"python: {python} is no interpreter; `posttrain environments install` makes one, in which a plug-in runs"
        )
    return path.stat().st_mtime


@cache
def _checked(python: str, changed_s: float) -> None:
    found = json.loads(_run(python, _PROBE))
    if tuple(found["version"][:2]) < OLDEST:
        version = ".".join(map(str, found["version"]))
        raise PluginError(
            f"python: {python} is Python {version}; a plug-in needs {'.'.join(map(str, OLDEST))} or newer"
        )
    if not found["msgspec"]:
        wanted = f"msgspec=={importlib.metadata.version('msgspec')}"
        raise PluginError(f"python: {python} has no msgspec; install it: {python} -m pip install {wanted}")


def _run(python: str, code: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [str(Path(python).expanduser()), "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
            env=client_environment(),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PluginError(f"python: {python} cannot be run: {error}") from None
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PluginError(f"python: {python} cannot be run: {words[0][:300]}")
    return done.stdout
