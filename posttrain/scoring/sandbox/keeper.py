"""The program that stays in a sandbox which is kept (`kept.py`): it runs one program after the other.

It reads jobs on its standard input and writes results, as JSON after four bytes with the length. Each program is a
process of its own with its own interpreter. When it has ended, everything that it started is killed, so only files in
/tmp are left for the next one. It imports the standard library only, because the package is not visible in the sandbox.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import IO, Any

_PROGRAM = "/tmp/.program.py"
_PR_SET_DUMPABLE = 4
_MAX_STDERR = 4096
_HEADER_BYTES = 4


def main() -> None:
    os.unlink("/tmp/main.py")  # this program, which must not lie among the files of others
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no program may look into this process
    jobs, results = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    while len(header := jobs.read(_HEADER_BYTES)) == _HEADER_BYTES:
        job = json.loads(jobs.read(int.from_bytes(header, "big")))
        body = json.dumps(_run(**job)).encode()
        data = memoryview(len(body).to_bytes(_HEADER_BYTES, "big") + body)
        while data:
            data = data[os.write(results, data) :]


def _run(source: str, stdin: str, *, is_isolated: bool, wall_s: float, cpu_s: int, output_bytes: int) -> dict[str, Any]:
    """Run a program and wait for its end. is_isolated: it cannot import the files in /tmp."""
    started_s = time.monotonic()
    given = os.memfd_create("stdin")  # not in /tmp, which may be full
    program = None
    try:
        with open(given, "w", encoding="utf-8", errors="surrogatepass", closefd=False) as file:
            file.write(stdin)
        os.lseek(given, 0, os.SEEK_SET)
        with open(_PROGRAM, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        program = subprocess.Popen(
            [sys.executable, "-B", *(["-I"] if is_isolated else ["-E", "-s"]), _PROGRAM],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s)),  # of each program, not of all
        )
        stdout, stderr, limit = _watch(program, started_s + wall_s, output_bytes)
    except OSError as error:  # no room for the program, or no process is left
        stdout, stderr, limit = b"", f"OSError: [Errno {error.errno}] {error.strerror}".encode(), ""
    finally:
        os.close(given)
    ended = _kill_all()
    exit_code = 1
    if program is not None:
        status = ended.get(program.pid, 0) if program.returncode is None else None
        program.returncode = os.waitstatus_to_exitcode(status) if status is not None else program.returncode
        exit_code = program.returncode if program.returncode >= 0 else 128 - program.returncode
        for pipe in (program.stdout, program.stderr):
            if pipe is not None:
                pipe.close()
    if os.path.lexists(_PROGRAM):
        os.unlink(_PROGRAM)
    return {
        "exit_code": exit_code,
        "stdout": stdout.decode("latin-1"),
        "stderr": stderr.decode(errors="replace"),
        "limit": limit,
        "wall_s": time.monotonic() - started_s,
    }


def _watch(program: "subprocess.Popen[bytes]", end_s: float, output_bytes: int) -> tuple[bytes, bytes, str]:
    """Read what a program prints until it ends or reaches a limit. Returns stdout, the end of stderr, and the limit."""
    assert program.stdout is not None
    assert program.stderr is not None
    ended = os.pidfd_open(program.pid)
    pipes: dict[int, tuple[IO[bytes], bytearray]] = {
        pipe.fileno(): (pipe, bytearray()) for pipe in (program.stdout, program.stderr)
    }
    stdout, stderr = (buffer for _, buffer in pipes.values())
    reading, limit = set(pipes), ""
    for descriptor in pipes:
        os.set_blocking(descriptor, False)
    try:
        while not limit:
            left_s = end_s - time.monotonic()
            ready = select.select([*reading, ended], [], [], max(left_s, 0.0))[0]
            for descriptor in ready:
                if descriptor != ended and not _read(descriptor, pipes[descriptor][1]):
                    reading.discard(descriptor)
            del stderr[:-_MAX_STDERR]
            if len(stdout) > output_bytes:
                limit = "output"
            elif ended in ready:
                for descriptor in reading:  # what it printed last; a process that it left behind is not waited for
                    while len(stdout) <= output_bytes and _read(descriptor, pipes[descriptor][1]):
                        pass
                break
            elif left_s <= 0:
                limit = "wall"
    finally:
        os.close(ended)
    return bytes(stdout[:output_bytes]), bytes(stderr[-_MAX_STDERR:]), limit


def _read(descriptor: int, buffer: bytearray) -> bool:
    """Read some bytes. Returns whether there were any."""
    try:
        data = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return False
    buffer += data
    return bool(data)


def _kill_all() -> dict[int, int]:
    """Kill every process but this one, however fast they fork. Returns the status of each that was waited for."""
    ended: dict[int, int] = {}
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
            time.sleep(0.001)
        except ChildProcessError:  # none is left
            try:
                os.kill(-1, 0)
            except ProcessLookupError:
                return ended
            time.sleep(0.001)


if __name__ == "__main__":
    main()
