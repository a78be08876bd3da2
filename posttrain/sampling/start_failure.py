"""Why an engine did not start, in one line.

vLLM starts its engine core in a process of its own. When that dies, vLLM says "See root cause above": the cause is in
what the process printed. Ray sends the output of an actor and its children to files, so what was added to them since
the start began can be read back. Where the output goes elsewhere, vLLM's own message has to do.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from posttrain.errors import StageError

# What vLLM puts before the lines of its processes: who writes, and for logged lines the level, time and place.
PREFIX = re.compile(r"^(\([\w ]+pid=\d+\) ?)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]+\] ?)?")
ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Killed)\b(: .*)?$")
POINTS_ELSEWHERE = re.compile(r"root cause|see (the )?stack trace", re.IGNORECASE)
# vLLM's options and the keys of this package.
KEYS = {
    "--kv-cache-memory-bytes": "engine.kv_cache_gib",
    "--gpu-memory-utilization": "engine.gpu_memory_fraction",
    "`gpu_memory_utilization`": "`engine.gpu_memory_fraction`",
    "`max_model_len`": "`engine.max_model_len`",
    "`max_num_seqs`": "`engine.max_num_seqs`",
}
TAIL_BYTES = 1 << 20
SHOWN = 600  # characters


class EngineStartError(StageError):
    """An engine could not be started. The message names the engine and the cause."""


class PrintedSince:
    """What this process and its children have printed since this object was made, if that goes to files."""

    def __init__(self) -> None:
        self._began = dict(filter(None, map(_file_behind, (1, 2))))

    def lines(self) -> list[str]:
        """The lines, those of standard output first, without vLLM's prefixes."""
        found: list[str] = []
        for path, began in self._began.items():
            try:
                with path.open("rb") as file:
                    file.seek(max(began, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                    found += file.read().decode(errors="replace").splitlines()
            except OSError:
                continue
        return [PREFIX.sub("", line) for line in found]


def _file_behind(descriptor: int) -> tuple[Path, int] | None:
    """The regular file that a descriptor writes to, and its present size; None for anything else."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")), status.st_size
    except OSError:
        return None


def start_error(name: str, error: BaseException, printed: Iterable[str]) -> EngineStartError:
    """The error of an engine that could not be started.

    It holds text alone: what vLLM raises cannot always be sent from one process to another.
    """
    text = " ".join(str(error).split())
    own = f"{type(error).__name__}: {text}" if text else type(error).__name__
    causes = [line for line in printed if ERROR_LINE.match(line) and not POINTS_ELSEWHERE.search(line)]
    cause = causes[-1] if causes and POINTS_ELSEWHERE.search(text) else own
    for option, key in KEYS.items():
        cause = cause.replace(option, key)
    return EngineStartError(f"engine {name} could not be started: {cause[:SHOWN]}")
