"""Ending a process of the cluster for certain: one that is frozen does not hear Ray."""

import contextlib
import os
import signal
import time
from typing import Any

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
