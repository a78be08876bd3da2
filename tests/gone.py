"""Whether a process has ended. One whose parent was killed stays as a zombie until the first process waits for it."""

import time

import psutil

WITHIN_S = 60.0  # a loaded machine may take long to end a process that was sent SIGKILL


def is_gone(pid: int) -> bool:
    """Whether the process ends, or has ended, within WITHIN_S."""
    end = time.monotonic() + WITHIN_S
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
