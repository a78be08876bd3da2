"""End processes for certain: a frozen process reacts neither to Ray nor to SIGTERM.

`pipeline/watchdog.py` searches the processes by itself: it runs by path, without this package and without psutil, so
that it starts in milliseconds and no broken installation can stop it.
"""

import contextlib
import os
import signal
import time
from typing import Any

import psutil

KILL_S = 10.0
GRACE_S = 2.0
LOOK_S = 0.02


def place_of_this() -> tuple[str, int]:
    """The id of this node in Ray, and of this process: what `kill_process` takes."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def kill_process(node: str, pid: int) -> None:
    """End a process that Ray was told to end, on any node of the cluster: SIGKILL if it still runs after two seconds.

    It is no error if the process or its node is already gone.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there)
    with contextlib.suppress(RayError):  # a timeout is one too
        ray.get(task.remote(pid), timeout=KILL_S)


def _kill(pid: int) -> None:
    end = time.monotonic() + GRACE_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(pid, 0)  # raises when it is gone
            time.sleep(LOOK_S)
        os.kill(pid, signal.SIGKILL)


def kill_marked(variable: str, value: str, session: int | None = None) -> list[psutil.Process]:
    """SIGKILL every process whose environment has this variable with this value. Returns the processes that were
    signalled.

    session: processes of this session are killed too. A child that moved to another session and lost its parent can be
    found only by its environment. The search repeats until it finds no new process, since a process may fork between
    the search and the signal. It does not wait for the processes to end.
    """
    killed: set[psutil.Process] = set()
    while found := _marked(variable, value, session) - killed:
        killed |= found
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()  # of this very process: psutil notices that its id was given to another
    return list(killed)


def _marked(variable: str, value: str, session: int | None) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            in_session = session is not None and os.getsid(process.pid) == session
            if in_session or process.environ().get(variable) == value:
                found.add(process)
    return found


class ForkWatch:
    """Notices that the processes whose environment has this variable with this value have become more than `limit`.

    It searches them only if the machine has so many more tasks than before, so that a look costs one small file. On a
    system without /proc it notices nothing.
    """

    def __init__(self, variable: str, value: str, limit: int):
        self._variable = variable
        self._value = value
        self.limit = limit
        self._before = _num_tasks()

    def is_over(self) -> bool:
        """Whether there are too many of them now."""
        now = _num_tasks()
        if now <= self._before + self.limit:
            self._before = min(self._before, now)
            return False
        if len(_marked(self._variable, self._value, None)) > self.limit:
            return True
        self._before = now  # others have begun
        return False


def _num_tasks() -> int:
    """How many processes and threads the machine has; 0 if that is not known."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0
