"""Ends the processes of a run whose driver process was killed with SIGKILL. Run by path, with the standard library.

    python watchdog.py DRIVER_PID SESSION TEMP_DIR

When the driver dies, Ray's servers die with it. Ray's agents live on for most of a minute, and engine processes of
killed workers may live forever. Every process of a session has POSTTRAIN_SESSION in its environment, which its children
inherit, and the watchdog searches for that mark. Ray's agents and workers write their title over a part of their
environment, which may destroy the mark. They have log files open under TEMP_DIR, by which they are found too.

The watchdog sleeps until the driver dies. A driver that ends normally ends the watchdog.

It reads /proc itself, where the rest of the package uses psutil (`posttrain/actors/processes.py`): started with
`python -S -E` it imports no package, so it starts in milliseconds and no broken environment can stop it.
"""

import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

VARIABLE = "POSTTRAIN_SESSION"
DEADLINE_S = 20.0


def session_processes(session: str, temp_dir: str = "") -> set[int]:
    """Ids of live processes with the session's mark, or with files open in `temp_dir` if that is given; not this
    process.
    """
    mark = f"{VARIABLE}={session}".encode()
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as environ:
                marked = mark in environ.read().split(b"\0") or (temp_dir and _has_open(entry, temp_dir))
            with open(f"/proc/{entry}/stat", "rb") as stat:
                dead = stat.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:
            continue
        if marked and not dead:
            found.add(int(entry))
    return found


def _has_open(pid: str, folder: str) -> bool:
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
        except FileNotFoundError:  # the process closed the file in the meantime
            continue
    return False


def descendants(roots: set[int]) -> set[int]:
    """The processes `roots` and all processes below them."""
    children: dict[int, set[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] not in (b"Z", b"X"):
            children.setdefault(int(fields[1]), set()).add(int(entry))
    found, waiting = set(roots), list(roots)
    while waiting:
        for child in children.get(waiting.pop(), set()) - found:
            found.add(child)
            waiting.append(child)
    return found


def kill_session(
    session: str, temp_dir: str, deadline_s: float = DEADLINE_S, *, spare: frozenset[int] = frozenset()
) -> set[int]:
    """SIGKILL the processes of the session repeatedly until none is left, for up to `deadline_s`; returns those left.

    A process may fork between the search and the signal, so one pass is not enough.
    """
    end = time.monotonic() + deadline_s
    while True:
        alive = descendants(session_processes(session, temp_dir)) - spare - {os.getpid()}
        if not alive or time.monotonic() > end:
            return alive
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)


def remove_traces(session: str, temp_dir: str) -> None:
    """Delete the session's temporary folder and its files in shared memory."""
    shutil.rmtree(temp_dir, ignore_errors=True)
    for path in Path("/dev/shm").glob(f"*{session}*"):
        path.unlink(missing_ok=True)


def _wait_for_death(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel without pidfd_open
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.5)
        return
    select.select([descriptor], [], [])


def main() -> None:
    """Wait until the driver is dead, then end its session."""
    pid, session, temp_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_death(pid)
    time.sleep(0.2)
    kill_session(session, temp_dir)
    remove_traces(session, temp_dir)


if __name__ == "__main__":
    main()
