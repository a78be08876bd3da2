"""End processes for certain: one that is frozen hears neither Ray nor a polite signal.

`pipeline/watchdog.py` has a walk of its own over the processes: it runs by path, without this package and without
psutil, so that it starts in milliseconds and nothing can break it.
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
    """End a process that Ray was told to end, on a node of this cluster: SIGKILL if it is there after two seconds.

    It may be gone already, and the node may be.
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
    """SIGKILL every process whose environment has this variable with this value. Returns those that got the signal.

    session: the processes of this session are killed too. A child that moved to another session and was orphaned can
    be found by its environment only. Looks again until nothing new is found, since a process may fork between the
    look and the signal. Does not wait for the processes to be gone.
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
