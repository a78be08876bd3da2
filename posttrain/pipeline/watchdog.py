"""Ends what a run left behind when its driver was killed outright. Run by path, standard library only.

    python watchdog.py DRIVER_PID SESSION TEMP_DIR

Ray's own servers die with the driver, but its agents linger for most of a minute and engine processes of killed workers
may live on. Every process of a session carries POSTTRAIN_SESSION in its environment, which children inherit; that mark
is what this looks for. Ray's agents and workers write their title over a part of their environment, and which part is
chance, so that some lose the mark: those have files open under TEMP_DIR, their logs. It sleeps until the driver dies,
and is itself ended by a driver that closes in order.

It walks /proc by itself, where the rest of the package uses psutil (`posttrain/actors/processes.py`): started with
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
    """Ids of live processes with the session's mark, or with files open in its folder if given; this one excepted."""
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
        except FileNotFoundError:  # closed meanwhile
            continue
    return False


def descendants(roots: set[int]) -> set[int]:
    """`roots` and every process below them."""
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
    """SIGKILL every process of the session, again and again until none is left. Returns those that would not die."""
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
    """Delete the session's temporary folder and its shared-memory files."""
    shutil.rmtree(temp_dir, ignore_errors=True)
    for path in Path("/dev/shm").glob(f"*{session}*"):
        path.unlink(missing_ok=True)


def _wait_for_death(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # an old kernel
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.5)
        return
    select.select([descriptor], [], [])


def main() -> None:
    """Wait, then kill."""
    pid, session, temp_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_death(pid)
    time.sleep(0.2)
    kill_session(session, temp_dir)
    remove_traces(session, temp_dir)


if __name__ == "__main__":
    main()
