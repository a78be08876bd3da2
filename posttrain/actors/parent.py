"""A process that ends with the process that started it, however that one ends. Standard library only.

`scoring/sandbox/inside.py` makes the same call by itself, because it runs in a sandbox that cannot import this package.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the thread that started it ends; other systems have no such request.

    parent: the process id of the one that started this process. Given that, this process exits at once where the
    parent has died before the request was made.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit("the process that started this one is gone")
