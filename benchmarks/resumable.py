"""For benchmarks that take hours in all: each run's result is written into one JSON file as soon as it is there.

--resume    keep what is in the file, and run only what is missing; without it the file is begun anew
--show      run nothing, and print what is there
--dir DIR   keep the folders of the runs, so that what several runs share is made once
--seeds     comma-separated, as are the other choices of a benchmark
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import machine


class Results:
    """The results by key, such as 10/uniform/1, with the machine of each. keep: begin with what the file holds."""

    def __init__(self, path: Path, *, keep: bool):
        self._path = path
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if keep and path.exists() else {}

    def fill(self, keys: Iterable[str], run: Callable[[str], dict[str, Any]], shown: Callable[[Any], str]) -> None:
        """Run each key that has no result, write its result, and print it as `shown` says."""
        for key in keys:
            if key in self.runs:
                continue
            about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
            self.runs[key] = {**run(key), **about, "load": round(os.getloadavg()[0], 2)}
            self._path.write_text(json.dumps(dict(sorted(self.runs.items())), indent=1) + "\n")
            print(f"{key}: {shown(self.runs[key])}", flush=True)


def options(doc: str | None, **choices: str) -> argparse.ArgumentParser:
    """The parser of the options above. choices: further options with a comma-separated default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("resume", "show"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--dir", type=Path)
    for name, default in choices.items():
        parser.add_argument(f"--{name}", default=default)
    return parser


def chosen(parser: argparse.ArgumentParser, text: str, known: Iterable[str]) -> list[str]:
    """The comma-separated names; the parser ends the program if one is not known."""
    names, allowed = text.split(","), list(known)
    if unknown := [name for name in names if name not in allowed]:
        parser.error(f"no such choice: {', '.join(unknown)}; there are {', '.join(allowed)}")
    return names


def folder_of(given: Path | None) -> Any:
    """A context with the folder of the runs: the given one, or a temporary one."""
    if given is None:
        return tempfile.TemporaryDirectory()
    given.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(given.resolve()))


def run_arms(
    doc: str | None,
    path: Path,
    arms: Iterable[str],
    *,
    run: Callable[[Path, str, int], dict[str, Any]],
    shown: Callable[[Any], str],
) -> dict[str, dict[str, Any]]:
    """The results of a benchmark whose keys are ARM/SEED. path: of its results. run: is given folder, arm and seed."""
    known = list(arms)
    parser = options(doc, arms=",".join(known), seeds="0,1,2")
    arguments = parser.parse_args()
    names = chosen(parser, arguments.arms, known)
    keys = [f"{arm}/{seed}" for seed in arguments.seeds.split(",") for arm in names]
    results = Results(path, keep=arguments.resume or arguments.show)

    def run_key(key: str, folder: str) -> dict[str, Any]:
        arm, _, seed = key.partition("/")
        return run(Path(folder), arm, int(seed))

    if not arguments.show:
        with folder_of(arguments.dir) as folder:
            results.fill(keys, lambda key: run_key(key, folder), shown)
    return results.runs
