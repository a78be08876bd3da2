"""Start the processes of base training, read the metrics of the first one, and end them all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import posttrain
from posttrain.base.cache import cache_key
from posttrain.base.config import StageConfig
from posttrain.errors import StageError

_LOG_TAIL_LINES = 12
_STOP_GRACE_S = 5.0


def train_base(
    config: StageConfig,
    seed: int,
    out: Path,
    *,
    scratch: Path,
    checkpoints: Path,
    on_step: Callable[[Mapping[str, object]], None],
) -> None:
    """Train a base model into the folder `out`, from its checkpoint if there is one.

    scratch: an existing folder for the log and for the file through which the processes meet. checkpoints: a folder,
    which is made. on_step: called with the metrics of each step: step (from 1), loss, tokens, reply_tokens, lr_scale,
    step_s.
    Raises `StageError` with the end of the log if a process fails.
    """
    spec = scratch.resolve() / "spec.json"
    store = spec.with_suffix(".store")
    store.unlink(missing_ok=True)
    settings = {
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "out": str(out.resolve()),
        "checkpoints": str(checkpoints.resolve()),
        "training": cache_key(config, seed),
        "parent": os.getpid(),
    }
    spec.write_text(json.dumps(settings), encoding="utf-8")
    log = scratch / "log.txt"
    process = _start(spec, log)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            on_step(json.loads(line))
        if process.wait() != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise StageError("\n".join([f"base training ended with {process.returncode}", *lines[-_LOG_TAIL_LINES:]]))
    finally:
        _stop(process)
        store.unlink(missing_ok=True)


def _start(spec: Path, log: Path) -> "subprocess.Popen[str]":
    root = str(Path(posttrain.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    with log.open("w", encoding="utf-8") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "posttrain.base.rank", str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        )


def _stop(process: "subprocess.Popen[str]") -> None:
    """End the first process. The processes that it forked end with it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
