"""Starts the processes of base training, listens to the first of them, and leaves none behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import posttrain
from posttrain.base.config import StageConfig
from posttrain.errors import StageError

_LOG_TAIL_LINES = 12
_STOP_GRACE_S = 5.0


def train_base(
    config: StageConfig, seed: int, out: Path, scratch: Path, on_step: Callable[[Mapping[str, Any]], None]
) -> None:
    """Train a base model into the folder `out`.

    scratch: an existing folder for the processes' logs and meeting point.
    on_step: called with each step's metrics: step (from 1), loss, tokens, reply_tokens, lr_scale, step_s.
    Raises `StageError` with the end of the log if a process fails.
    """
    spec = scratch / "spec.json"
    store = spec.with_suffix(".store")
    store.unlink(missing_ok=True)
    settings = {"config": config.model_dump(mode="json"), "seed": seed, "out": str(out), "parent": os.getpid()}
    spec.write_text(json.dumps(settings), encoding="utf-8")
    processes: list[subprocess.Popen[str]] = []
    try:
        processes = [_start(spec, rank, scratch) for rank in range(config.processes)]
        first = processes[0].stdout
        assert first is not None
        for line in first:
            on_step(json.loads(line))
        # A process whose peer is gone may wait for it; the first to fail has closed its output, or been told so.
        for rank, process in enumerate(processes):
            if process.wait() != 0:
                raise StageError(
                    f"base training: process {rank} ended with {process.returncode}\n{_tail(scratch, rank)}"
                )
    finally:
        _stop(processes)
        store.unlink(missing_ok=True)


def _start(spec: Path, rank: int, scratch: Path) -> "subprocess.Popen[str]":
    root = str(Path(posttrain.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    with (scratch / f"log-{rank}.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "posttrain.base.worker", str(spec), str(rank)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
            env=environment,
            text=True,
        )


def _tail(scratch: Path, rank: int) -> str:
    lines = (scratch / f"log-{rank}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def _stop(processes: list["subprocess.Popen[str]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
