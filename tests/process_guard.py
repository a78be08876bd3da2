"""Tests without the mark `slow`, `full` or `gpu` start no process and no server: `make test-fast` relies on that.

While `no_processes()` is active, every way from Python to a new process, and to a listening socket, raises
`ProcessStarted`. Code under test may catch that error, so what was refused is also listed, and the test fails at its
end. Left out: what compiled extensions start by themselves.
"""

import multiprocessing.process
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Audit events of the interpreter (https://docs.python.org/3/library/audit_events.html) that start a process.
EVENTS = {
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.exec",
}
_refused: list[list[str]] = []  # one list for each active guard, the innermost last


class ProcessStarted(RuntimeError):
    """A test that may not start a process or server tried to."""


def active() -> int:
    """How many guards are active, one inside the other."""
    return len(_refused)


def _refuse(what: str) -> None:
    _refused[-1].append(what)
    raise ProcessStarted(
        f"{what}: a test without the mark `slow` starts no process and no server (make test-fast promises it); "
        "mark the test `slow`, or test the function without a process"
    )


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _refused and event in EVENTS:
        _refuse(f"{event} {arguments[:2]!r}")


def _install() -> None:
    """Once for the interpreter: an audit hook can never be removed, so it asks whether a guard is active."""
    sys.addaudithook(_hook)
    start, listen = multiprocessing.process.BaseProcess.start, socket.socket.listen

    # multiprocessing's "spawn" and "forkserver" raise no audit event, and neither does listen().
    def guarded_start(self: Any) -> None:
        if _refused:
            _refuse(f"multiprocessing.Process {self.name}")
        start(self)

    def guarded_listen(self: socket.socket, *backlog: int) -> None:
        if _refused:
            _refuse("socket.listen")
        listen(self, *backlog)

    multiprocessing.process.BaseProcess.start = guarded_start
    socket.socket.listen = guarded_listen


@contextmanager
def no_processes() -> Iterator[list[str]]:
    """Refuse processes and servers inside; yields the list of what was refused so far."""
    refused: list[str] = []
    _refused.append(refused)
    try:
        yield refused
    finally:
        _refused.remove(refused)


@contextmanager
def guarded(keywords: Any) -> Iterator[None]:
    """Around one phase of a test with these keywords. Raises ProcessStarted if it hid a refusal."""
    if any(mark in keywords for mark in ("slow", "full", "gpu")):
        yield
        return
    with no_processes() as refused:
        yield
    if refused:
        raise ProcessStarted(f"the test, or code under it, caught this refusal: {refused[0]}")


_install()
