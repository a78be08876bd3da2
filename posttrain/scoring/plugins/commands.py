"""Commands as plug-ins: where their programs are found, which files they name, and what is wrong with one."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AGENT = "posttrain.episodes.agents.environment:agent"  # the environment whose argument `command` is one


def search_path() -> str:
    """The folders in which programs are found: that of the interpreter that runs this package comes first, so that
    `python` means this one."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def is_own_python(program: str) -> bool:
    """Whether a program is in the folder of the interpreter that runs this package."""
    found = shutil.which(program, path=search_path())
    return found is not None and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)


def agent_problem(args: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of the environment `agent`; "" if nothing is."""
    if problem := _command_problem(args.get("command")):
        return f"command: {problem}"
    if (scored_by := args.get("scored_by", "agent")) not in ("agent", "reward"):
        return f"scored_by: got {scored_by!r}; it must be agent or reward"
    calls = args.get("max_calls", 1)
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        return f"max_calls: got {calls!r}; it must be a whole number of at least 1"
    if not isinstance(args.get("own_temperature", False), bool):
        return f"own_temperature: got {args['own_temperature']!r}; it must be true or false"
    if not isinstance(model := args.get("model", "policy"), str) or not model:
        return f"model: got {model!r}; it must be a name"
    return ""


def _command_problem(command: object) -> str:
    """A word that ends in .py must be a file."""
    if not isinstance(command, list | tuple) or not command or not all(isinstance(word, str) for word in command):
        return f'got {command!r}; write a list of words, such as ["python", "my_agent.py"]'
    if shutil.which(command[0], path=search_path()) is None:
        return f"there is no program {command[0]!r}"
    missing = next((word for word in command[1:] if word.endswith(".py") and not Path(word).is_file()), None)
    return f"there is no file {missing}" if missing is not None else ""


def command_files(command: object) -> list[Path]:
    """The files that a command names."""
    words = command if isinstance(command, list | tuple) else []
    return [Path(word).resolve() for word in words[1:] if isinstance(word, str) and Path(word).is_file()]
