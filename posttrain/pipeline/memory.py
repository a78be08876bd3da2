"""Peak memory of a run: the proportional set size (PSS) of this process and all its descendants, sampled by a thread.

PSS counts a page that n processes share as 1/n in each of them. So the sum counts shared memory once, such as Ray's
object store and the weights in shared memory. If the kernel gives no PSS, private memory (RSS minus shared) is used
instead. Other machines of a cluster are not measured.
"""

import threading
from types import TracebackType

import psutil

GIB = 1 << 30


class MemorySampler:
    """Measures once every `interval_s` seconds while its `with` block runs. peak_gib: the largest sum so far."""

    def __init__(self, interval_s: float = 1.5):
        self.interval_s = interval_s
        self.peak_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_gib = max(self.peak_gib, tree_memory_bytes() / GIB)
            if self._stop.wait(self.interval_s):
                return


def tree_memory_bytes() -> int:
    """Memory of this process and its descendants now: the sum of their PSS in bytes."""
    this = psutil.Process()
    return sum(_memory(process) for process in [this, *this.children(recursive=True)])


def _memory(process: psutil.Process) -> int:
    """PSS of one process in bytes, or its private memory where there is no PSS."""
    try:
        return process.memory_full_info().pss
    except (psutil.AccessDenied, AttributeError):
        pass
    except psutil.Error:
        return 0
    try:
        info = process.memory_info()
    except psutil.Error:
        return 0
    return max(info.rss - getattr(info, "shared", 0), 0)
