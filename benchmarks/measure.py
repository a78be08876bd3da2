"""Shared by the benchmarks: time several things in turns, measure peak memory, describe the machine, read the options.

python benchmarks/NAME.py [--json FILE] [--only NAME[,NAME]] [--seed N]
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "deepspeed")
MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True)
class Entry:
    """One benchmark. run: returns the figure, or the figure and further values for the results file.

    Of the further values, lists and dicts are not printed. goal: the goal of the figure, in words, or None.
    """

    run: Callable[[], Any]
    goal: str | None = None


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes, including the work that it started on a GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(peer: Callable[[], object], ours: Callable[[], object], rounds: int, *, inner: int = 2) -> float:
    """The time of the peer / ours: the median over rounds, each of which times both as the best of `inner` calls."""
    for run in (peer, ours):
        seconds(run)  # warm up, and wait for all work on a GPU
    return statistics.median(
        min(seconds(peer) for _ in range(inner)) / min(seconds(ours) for _ in range(inner)) for _ in range(rounds)
    )


def peak_mib(run: Callable[[], None], device: str) -> float:
    """The peak of memory during the second of two calls, less the memory in use before it, in MiB.

    On a CPU the memory of the process is measured. The allocator is set to give large blocks back at once; otherwise
    free blocks that it keeps would count as used, or hide memory that is used.
    """
    if device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 20)
    run()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_kib("VmRSS")
    run()
    peak = status_kib("VmHWM")
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)  # the value that glibc arrives at by itself
    return (peak - before) / 1024


def status_kib(key: str) -> int:
    """A figure of this process's memory, such as VmRSS (now) or VmHWM (its peak), in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def machine() -> dict[str, Any]:
    """The machine and the package versions of the figures."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpus": os.cpu_count(),
        "cpu_model": models[0] if models else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def main(doc: str | None, table: Mapping[str, Entry], libraries: Sequence[str] = LIBRARIES) -> None:
    """Run the entries that the command line names, print each figure, and write them to the file of `--json`.

    doc: the docstring of the benchmark's module. libraries: their versions are written into the results.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--only", default="", help="entries to run, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name] or list(table)
    if unknown := [name for name in chosen if name not in table]:
        parser.error(f"--only: no entry {', '.join(unknown)}; there are: {', '.join(table)}")
    torch.set_num_threads(1)
    results = {}
    for name in chosen:
        torch.manual_seed(arguments.seed)
        measured = table[name].run()
        figure, detail = measured if isinstance(measured, tuple) else (measured, {})
        detail = {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in {**detail, "load": os.getloadavg()[0]}.items()
        }
        results[name] = {"figure": round(figure, 3), "goal": table[name].goal, **detail}
        goal = f"   goal {table[name].goal}" if table[name].goal else ""
        shown = (f"  {key} {value}" for key, value in detail.items() if not isinstance(value, dict | list))
        print(f"{name:30} {figure:9.3f}{goal}", *shown, flush=True)
    if arguments.json:
        versions = {"python": platform.python_version(), **{name: version(name) for name in libraries}}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        report = {"date": date, "machine": machine(), "versions": versions, "seed": arguments.seed, "entries": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
