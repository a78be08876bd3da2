"""Rows that a generator makes: `reasoning-gym:leg_counting?size=500&seed=1` in the place of a path.

The first part names a dataset of reasoning-gym, an environment of verifiers (`verifiers:my_env.py:load?size=500`,
`verifiers-v1:my_tasks.py?size=500`) or a game of TextArena; the rest its size, its seed, and settings of its own, as
JSON values. `python` names the interpreter that has the package, if it is not this one. The rows are kept in a file in
the cache, so that each is made once. The reward or environment for them is in `posttrain/environments/`.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from posttrain.errors import DataError
from posttrain.files import replacing
from posttrain.scoring.plugins.interpreter import client_environment

_MAKE_S = 600.0
_PROGRAM = """
import json, sys
import reasoning_gym
job = json.load(sys.stdin)
data = reasoning_gym.create_dataset(job["dataset"], size=job["size"], seed=job["seed"], **job["settings"])
for index, entry in enumerate(data):
    print(json.dumps({
        "id": f"{job['dataset']}-{job['seed']}-{index}", "capability": job["dataset"], "prompt": entry["question"],
        "answer": entry["answer"], "reasoning_gym": {**job, "index": index},
    }))
"""


@dataclass(frozen=True, slots=True)
class Generator:
    """Makes rows. scheme: begins its sources. what: the first part of one. package: that it imports. adapter: its name
    for `posttrain environments install`. program: reads a job from stdin and prints a row in each line."""

    scheme: str
    what: str
    package: str
    adapter: str
    program: str


GENERATORS = (
    Generator("reasoning-gym:", "DATASET", "reasoning_gym", "reasoning_gym", _PROGRAM),
    Generator(
        "verifiers:",
        "my_env.py:load",
        "verifiers",
        "verifiers",
        "from posttrain.environments.verifiers import write_rows; write_rows()",
    ),
    Generator(
        "verifiers-v1:",
        "my_tasks.py",
        "verifiers",
        "verifiers_v1",
        "from posttrain.environments.verifiers_v1 import write_rows; write_rows()",
    ),
    Generator(
        "textarena:",
        "GuessTheNumber-v0",
        "textarena",
        "textarena",
        "from posttrain.environments.textarena import write_rows; write_rows()",
    ),
)


def is_generated(source: str) -> bool:
    """Whether a path names rows that a generator makes."""
    return any(source.startswith(generator.scheme) for generator in GENERATORS)


def generated_path(source: str) -> Path:
    """The file with the rows of a source, which is made if it is not in the cache. Raises `DataError`."""
    generator = next(generator for generator in GENERATORS if source.startswith(generator.scheme))
    job, python = _job(source, generator)
    key = hashlib.sha256(json.dumps([job, python, generator.program, _file_of(job)]).encode()).hexdigest()[:16]
    given = os.environ.get("POSTTRAIN_CACHE")
    root = Path(given) if given else Path.home() / ".cache" / "posttrain"
    path = root / "generated" / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', job['dataset'])}-{key}.jsonl"
    if not path.exists():
        rows = _made(source, job, python, generator=generator)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(rows, encoding="utf-8")
    return path


def _file_of(job: Mapping[str, Any]) -> str:
    """The source of the file that makes the rows; "" if the job names none."""
    dataset = job["dataset"]
    path = Path(dataset if dataset.endswith(".py") else dataset.rpartition(":")[0])
    return path.read_text(encoding="utf-8", errors="replace") if path.suffix == ".py" and path.is_file() else ""


def _job(source: str, generator: Generator) -> tuple[dict[str, Any], str]:
    """What to make, and with which interpreter."""
    name, _, query = source.removeprefix(generator.scheme).partition("?")
    settings: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    python = settings.pop("python", sys.executable)
    size, seed = settings.pop("size", None), settings.pop("seed", 0)
    if not name or not isinstance(size, int) or size < 1 or not isinstance(seed, int):
        raise DataError(
            f"{source}: write {generator.scheme}{generator.what}?size=500&seed=1, where size is how "
            "many rows are made (at least 1) and seed a whole number"
        )
    return {"dataset": name, "size": size, "seed": seed, "settings": settings}, str(Path(str(python)).expanduser())


def _made(source: str, job: Mapping[str, Any], python: str, *, generator: Generator) -> str:
    if python == sys.executable and importlib.util.find_spec(generator.package) is None:
        raise DataError(
            f"{source}: {generator.scheme.removesuffix(':')} is not installed here; `posttrain environments install "
            f"{generator.adapter}` makes an interpreter that has it; add &python=PATH with its path to the source"
        )
    try:
        done = subprocess.run(
            [python, "-c", generator.program],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_MAKE_S,
            check=False,
            env=client_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{source}: {python} cannot make the rows: {error}") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"{source}: {python} cannot make the rows: {words[:500]}")
    return done.stdout
