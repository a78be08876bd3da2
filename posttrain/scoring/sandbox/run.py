"""Runs an untrusted Python program without network, with no host files but the interpreter, and with hard limits on
time, memory, processes and output. It runs in a process of its own, and not at all if the system cannot isolate it.

There are two ways to isolate it: Linux namespaces (`inside.py`, as root or with user namespaces) or bubblewrap. The
first that works is used from then on. Left out: seccomp filters, and installed packages: a program can import the
standard library only.
"""

import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.errors import PosttrainError

_INIT = Path(__file__).with_name("inside.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_MAX_STDERR = 4096
SETUP_S = 30.0
# If a Python program meets a limit of the kernel, the last line of stderr begins like this; and which limit it was.
_LIMIT_ERRORS = {
    "MemoryError": "memory",
    "BlockingIOError: [Errno 11]": "processes",
    "RuntimeError: can't start new thread": "processes",
    "OSError: [Errno 24]": "files",
    "OSError: [Errno 27]": "disk",
    "OSError: [Errno 28]": "disk",
}


class SandboxError(PosttrainError):
    """The program was not run, because this system has no sandbox or the sandbox could not be set up."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. wall_s, cpu_s: seconds. memory_mib: address space of a process. disk_mib: its /tmp."""

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_mib: int = 512
    num_processes: int = 16
    disk_mib: int = 32
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program ended. limit: "" or the limit that ended it (wall, cpu, output, memory, processes, files, disk).

    exit_code: as in a shell (128 + signal). stderr: the last 4 KB. wall_s: seconds, without the sandbox's setup.
    """

    exit_code: int
    stdout: bytes
    stderr: str
    limit: str
    wall_s: float


def run_python(source: str, stdin: bytes = b"", limits: Limits | None = None) -> SandboxResult:
    """Run the source as a program and wait for its end. Raises SandboxError if it cannot be run."""
    return _run(require_sandbox(), source, stdin, limits=limits or Limits())


def require_sandbox() -> str:
    """How this system can isolate a program, as `find_sandbox`. Raises SandboxError if it cannot."""
    way = find_sandbox()
    if way is None:
        raise SandboxError(
            "no sandbox for model-written code: this system allows neither Linux namespaces nor bubblewrap (bwrap); "
            "install bubblewrap or allow user namespaces. The code was not run."
        )
    return way


@functools.cache
def find_sandbox() -> str | None:
    """How this system can isolate a program: "namespaces", "bubblewrap" or None. It is tried once in each process."""
    for way in ("namespaces", "bubblewrap"):
        try:
            if _run(way, "print(6 * 7)", b"", limits=Limits(wall_s=20.0)).stdout == b"42\n":
                return way
        except (SandboxError, OSError):
            continue
    return None


def _run(way: str, source: str, stdin: bytes, *, limits: Limits) -> SandboxResult:
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as input_file:
        input_file.write(stdin)
        input_file.seek(0)
        ready_read, ready_write = os.pipe()
        with os.fdopen(ready_read, "rb") as ready:
            try:
                command, options = start_of(way, source, asdict(limits), job_file=job_file, ready_fd=ready_write)
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                process: Any = subprocess.Popen(command, stdin=input_file, **pipes, **options)
            finally:
                os.close(ready_write)
            return _watch(process, ready, limits)


def start_of(
    way: str, source: str, limits: Mapping[str, Any], *, job_file: IO[bytes], ready_fd: int
) -> tuple[list[str], dict[str, Any]]:
    """The command that runs a source in a sandbox, and the options to start it with.

    way: of `find_sandbox`. limits: the fields of `Limits`. job_file: an empty file, in which the command finds its job.
    ready_fd: a pipe, to which the sandbox writes b"ready" when the program begins.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    # Root is exempt from RLIMIT_NPROC, and root stays root inside bubblewrap: so the program runs under another uid.
    user = 20_000 if way == "bubblewrap" and os.geteuid() == 0 else None
    visible = [path for path in (*_SYSTEM, sys.base_prefix) if os.path.lexists(path)]
    job = {"source": source, "python": python, "visible": visible, "limits": limits, "parent": os.getpid()}
    job_file.write(json.dumps(job).encode())
    job_file.seek(0)
    descriptors = (job_file.fileno(), ready_fd)
    options: dict[str, Any] = {"pass_fds": descriptors, "env": {"PATH": os.defpath}, "cwd": "/"}
    if user is not None:
        options |= {"user": user, "group": user, "extra_groups": []}
    return _command(way, python, visible, descriptors=descriptors), options


def _command(way: str, python: str, visible: list[str], *, descriptors: tuple[int, int]) -> list[str]:
    init = [python, "-I", "-S", "-B", str(_INIT), *map(str, descriptors)]
    if way == "namespaces":
        return [*init, "isolate"]
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SandboxError("bubblewrap (bwrap) is not installed")
    binds = [word for path in visible for word in ("--ro-bind", os.path.realpath(path), path)]
    return [
        bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *binds,
        "--ro-bind", str(_INIT), "/inside.py", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp", "--",
        *(word if word != str(_INIT) else "/inside.py" for word in init), "limit",
    ]  # fmt: skip


def limit_of_error(line: str) -> str:
    """The limit that the last line of a traceback (`Type: message`) points to; "" if it points to none."""
    return next((limit for begin, limit in _LIMIT_ERRORS.items() if line.startswith(begin)), "")


def _watch(process: "subprocess.Popen[bytes]", ready: IO[bytes], limits: Limits) -> SandboxResult:
    """Read the program's output until it ends or reaches a limit. Afterwards it and everything that it started is dead.

    The program's time starts when the sandbox is ready, because a slow setup is not the program's fault.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    started_s, left_s, is_ready = time.monotonic(), SETUP_S, False
    stdout, stderr, limit = bytearray(), bytearray(), ""
    with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        selector.register(process.stdout, selectors.EVENT_READ, stdout)
        selector.register(process.stderr, selectors.EVENT_READ, stderr)
        while selector.get_map() and not limit:
            for key, _ in selector.select(max(left_s, 0.0)):
                if key.data is None:  # "ready" in one write, or the end of a sandbox that could not be set up
                    is_ready = os.read(key.fd, 16) == b"ready"
                    selector.unregister(key.fileobj)
                    started_s = time.monotonic()
                    continue
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data)
            del stderr[:-_MAX_STDERR]
            left_s = started_s + (limits.wall_s if is_ready else SETUP_S) - time.monotonic()
            if len(stdout) > limits.output_bytes:
                limit = "output"
            elif left_s <= 0 and selector.get_map():
                limit = "wall"
        try:
            exit_code = process.wait(max(left_s, 0.0) if not limit else 0.0)
        except subprocess.TimeoutExpired:
            limit = limit or "wall"
            process.kill()
            exit_code = process.wait()
    words = stderr.decode(errors="replace").strip()
    if not is_ready:
        late = f"not within {SETUP_S:g} s" if limit else f"exit code {exit_code}"
        raise SandboxError(f"the sandbox could not be set up: {words[-300:] or late}")
    # The program cannot signal the process that this function watches. If a signal ended it and no limit explains that,
    # the signal came from outside. It says nothing about the program, so it must not become a reward of 0.
    if exit_code < 0 and not limit:
        raise SandboxError(f"the sandbox was killed by {signal.Signals(-exit_code).name}")
    wall_s = time.monotonic() - started_s
    limit = limit or limit_of(exit_code, words, wall_s)
    return SandboxResult(exit_code, bytes(stdout[: limits.output_bytes]), words, limit, wall_s)


def limit_of(exit_code: int, stderr: str, wall_s: float) -> str:
    """The limit that ended a program, from how it ended and its last words; "" if none did."""
    if exit_code == 128 + 24 or (exit_code == 128 + 9 and wall_s > 0.5):  # SIGXCPU, or SIGKILL at the hard limit
        return "cpu"
    # Of several processes that write at once, each may have the last line.
    return next(filter(None, map(limit_of_error, reversed(stderr.splitlines()))), "") if exit_code else ""
