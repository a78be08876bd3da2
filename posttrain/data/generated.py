"""Rows that a generator makes: `reasoning-gym:leg_counting?size=500&seed=1` in the place of a path.

The first part names one of the datasets of reasoning-gym, the rest its size, its seed, and settings of its own, as JSON
values. `python` names the interpreter that has the package, if it is not this one. The rows are kept in a file in the
cache, so that each is made once. The reward
`posttrain.environments.reasoning_gym:score` scores answers to them.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from posttrain.errors import DataError
from posttrain.files import replacing

SCHEME = "reasoning-gym:"
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


def generated_path(source: str) -> Path:
    """The file with the rows of a source, which is made if it is not in the cache. Raises `DataError`."""
    job, python = _job(source)
    key = hashlib.sha256(json.dumps([job, python, _PROGRAM], sort_keys=True).encode()).hexdigest()[:16]
    given = os.environ.get("POSTTRAIN_CACHE")
    root = Path(given) if given else Path.home() / ".cache" / "posttrain"
    path = root / "generated" / f"{job['dataset']}-{key}.jsonl"
    if not path.exists():
        rows = _made(source, job, python)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(rows, encoding="utf-8")
    return path


def _job(source: str) -> tuple[dict[str, Any], str]:
    """What to make, and with which interpreter."""
    name, _, query = source.removeprefix(SCHEME).partition("?")
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
            f"{source}: write {SCHEME}DATASET?size=500&seed=1, where size is how many rows are made (at least 1) and "
            "seed a whole number"
        )
    return {"dataset": name, "size": size, "seed": seed, "settings": settings}, str(Path(str(python)).expanduser())


def _made(source: str, job: Mapping[str, Any], python: str) -> str:
    if python == sys.executable and importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(
            f"{source}: reasoning-gym is not installed here; `posttrain environments install reasoning_gym` makes an "
            "interpreter that has it; add &python=PATH with its path to the source"
        )
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [python, "-c", _PROGRAM],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_MAKE_S,
            check=False,
            env=variables,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{source}: {python} cannot make the rows: {error}") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"{source}: {python} cannot make the rows: {words[:500]}")
    return done.stdout
