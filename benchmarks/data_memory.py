"""How much memory the stages take for large datasets: `python benchmarks/data_memory.py --rows 2000000`.

Rows are written to a temporary folder, and each job reads them in a process of its own. Printed are seconds, the peak
of the memory that only the process has (RssAnon), and the peak with the pages of mapped files (ru_maxrss), which the
system takes back when other programs need memory. Left out: models and tokenizers.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEXT = "Add the first number to the second one, then say what you get and how. " * 4


def chats(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of 680 bytes."""
    for number in range(count):
        yield {
            "messages": [
                {"role": "user", "content": f"{number}: {TEXT}"},
                {"role": "assistant", "content": f"{number + 1}: {TEXT}"},
            ],
        }


def prompts(count: int) -> Iterator[dict[str, Any]]:
    """Prompts of 340 bytes with an answer, of five capabilities."""
    for number in range(count):
        yield {
            "id": f"p{number}",
            "capability": f"c{number % 5}",
            "prompt": f"{number}: {TEXT}",
            "answer": str(number),
        }


def load_sft(path: Path) -> None:
    """Read and hold out, as SFT does before it makes tokens."""
    from posttrain.config.held_out import HeldOutConfig
    from posttrain.data.held_out import prompt_key, split
    from posttrain.data.rows import store_rows

    rows = store_rows(path, kind="supervised", stage="sft")
    split(rows, (prompt_key(row.messages) for row in rows), HeldOutConfig(rows=1000))


def load_filter(path: Path) -> None:
    """Read, and select by verdicts that are made up."""
    from posttrain.config.base import validate_config
    from posttrain.data.rows import store_rows
    from posttrain.data.stored import store
    from posttrain.filtering.config import FilterConfig
    from posttrain.filtering.stage import VerdictsById, split
    from posttrain.judging.verdicts import Verdict, verdict_of

    config = validate_config(FilterConfig, {"judge": {"path": "judge"}, "data": {"path": str(path)}}, "benchmark")
    rows = store_rows(path, kind="supervised", stage="filter")
    verdicts = store(
        (verdict_of(config.labels, [0.0, -float(place % 97), -1.0]) for place in range(len(rows))), Verdict
    )
    kept, _ = split(rows, verdicts, config, seed=0)
    known = VerdictsById(rows, verdicts)
    assert known[kept[0].id]


def load_rl(path: Path) -> None:
    """Read, check and draw, as RL does, but for the rendering by a chat template."""
    from posttrain.config.base import validate_config
    from posttrain.rl.config import RlConfig
    from posttrain.rl.inputs import read_rows
    from posttrain.rl.prompts.beliefs import Beliefs
    from posttrain.rl.prompts.fingerprints import dataset_fingerprint
    from posttrain.rl.prompts.selection import Selection
    from posttrain.rl.prompts.source import PromptSource

    settings = {"model": {"path": "policy"}, "prompts": {"path": str(path)}, "reward": {"name": "exact_match"}}
    config = validate_config(RlConfig, settings, "benchmark")
    rows = read_rows(config)
    dataset_fingerprint(rows)
    selection = Selection(Beliefs(rows, config.selection.half_life), group_size=config.group_size, seed=0)
    source = PromptSource(rows, config.systems, lambda row, messages: (1,), seed=0, selection=selection)
    for order in range(200):
        drawn = source.draw(f"c{order % 5}", order)
        selection.beliefs.observe(drawn.row.id, 1, 1, version=0)
    source.advance(1)


def load_inspect(path: Path) -> None:
    """`posttrain data inspect`, with lengths in characters."""
    from posttrain.data.inspection import inspect

    inspect(str(path), "supervised", lambda row: sum(len(message.text) for message in row.messages))


JOBS: dict[str, tuple[Callable[[Path], None], Callable[[int], Iterator[dict[str, Any]]]]] = {
    "sft": (load_sft, chats),
    "filter": (load_filter, chats),
    "inspect": (load_inspect, chats),
    "rl": (load_rl, prompts),
}


def watched(job: Callable[[Path], None], path: Path) -> dict[str, float]:
    """Seconds of the job, and peaks of the memory of this process in MiB."""
    own = 0
    is_over = threading.Event()

    def watch() -> None:
        nonlocal own
        while not is_over.wait(0.1):
            status = Path("/proc/self/status").read_text()
            own = max(own, int(status.partition("RssAnon:")[2].split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        job(path)
    finally:
        is_over.set()
        thread.join()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(time.monotonic() - began), "own_mib": own >> 10, "with_files_mib": whole >> 10}


def main() -> None:
    """Measure each job for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--folder", help="where the rows are written; default: the folder for temporary files")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)  # of the rows, in the process of a job
    given = parser.parse_args()
    if given.path is not None:
        print(json.dumps(watched(JOBS[given.jobs[0]][0], given.path)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for count in given.rows:
            for name in given.jobs:
                make = JOBS[name][1]
                path = Path(folder) / f"{make.__name__}_{count}.jsonl"
                if not path.exists():
                    with path.open("w") as file:
                        file.writelines(json.dumps(row) + "\n" for row in make(count))
                command = [sys.executable, __file__, "--jobs", name, "--path", str(path)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"{name} {count:,} rows: {found.strip()}", flush=True)


if __name__ == "__main__":
    main()
