"""Runs a stage in a process of its own: redirects output to log.txt, seeds, calls the stage's function, answers.

Exceptions are not sent through Ray. The traceback is written to log.txt. The answer has one message, and says whether
the user can correct the cause.
"""

import contextlib
import os
import random
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.actors.garbage import rare_collections
from posttrain.context import StageContext
from posttrain.errors import PosttrainError, UserError
from posttrain.files import OUT_OF_SPACE
from posttrain.metrics.trackers import tracked
from posttrain.pipeline.adapters import forget_whole_models, with_whole_models
from posttrain.pipeline.kinds import StageKind, load_object, load_schema
from posttrain.pipeline.lengths import settled


@dataclass(frozen=True)
class StageJob:
    """Everything that a stage's process needs to know.

    config: with paths in place of references. cwd: the directory to which paths in the config are relative.
    """

    name: str
    kind: StageKind
    config: dict[str, Any]
    dir: Path
    events: Path
    seed: int
    warm_engines: bool
    cwd: str


@dataclass(frozen=True)
class StageAnswer:
    """How a stage ended. error: one message, "" for success. user: True if the user's input was at fault."""

    result: dict[str, Any]
    wall_s: float
    error: str = ""
    user: bool = False


def run_stage(job: StageJob) -> StageAnswer:
    """Run one stage. Every Exception becomes an answer."""
    started = time.perf_counter()
    try:
        redirect_output(job.dir / "log.txt")
        if os.path.isdir(job.cwd):
            os.chdir(job.cwd)
            if job.cwd not in sys.path:
                sys.path.insert(0, job.cwd)  # so that a reward's module beside the user's YAML can be imported
        with rare_collections():  # also during the imports of the stage, which create many objects
            run = load_object(job.kind.run)
            joined = {name: load_object(target) for name, target in job.kind.joined.items()}
            context = StageContext(job.name, job.dir, job.events, job.seed, job.warm_engines)
            given = load_schema(job.kind).model_validate(job.config)
            config = settled(with_whole_models(given, job.kind, context), "config")
            seed_everything(job.seed)
            with tracked(getattr(config, "trackers", None), context):
                result = run(config, context, **joined) or {}
            forget_whole_models(config, context)
        return StageAnswer(dict(result), time.perf_counter() - started)
    except Exception as error:
        log_error()
        # Ray wraps what an actor raised. The actor's own error tells the user what to correct.
        cause = getattr(error, "cause", None) or error
        return StageAnswer({}, time.perf_counter() - started, describe(cause), isinstance(cause, UserError))


def redirect_output(path: Path) -> None:
    """Send this process's standard output and error, and those of its children, to the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch, as far as the stage has imported them."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def log_error() -> None:
    """Write the traceback to log.txt. On a full disk nothing is written."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def describe(error: BaseException) -> str:
    """One message for the user: the text of our own errors, the name of a full disk, else type and first line."""
    if isinstance(error, PosttrainError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full, or a limit on file size was reached{where}: {error.strerror}"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
