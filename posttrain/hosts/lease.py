"""The lease by which engines of a host work: they are ended if the home host has not been heard for too long.

    directory (home host) ──renew, each second──► agent ──► lease ──LEASE_S without a word──► SIGKILL to the engines

A host that was cut off cannot be told that its engines were replaced. They can write nothing: what they sample goes to
the home host alone, which no longer listens to them. But they would sample on, and hold GPUs, for as long as Ray needs
to notice that it is alone.
"""

import contextlib
import threading
import time

import psutil

LEASE_S = 60.0  # much longer than a busy home host is silent
LOOK_S = 1.0
STOPPED_S = 5.0  # if a look takes so much longer than LOOK_S, this process itself was stopped meanwhile


class Lease:
    """The lease of one host. lease_s: how long it lasts without `renew`."""

    def __init__(self, lease_s: float = LEASE_S, look_s: float = LOOK_S):
        self._lease_s = lease_s
        self._look_s = look_s
        self._processes: set[psutil.Process] = set()  # which know when an id was given to another
        self._renewed = time.monotonic()
        self._watching: threading.Thread | None = None

    def renew(self) -> None:
        """Note that the home host was heard."""
        self._renewed = time.monotonic()

    def enroll(self, pid: int) -> None:
        """End this process if the lease runs out. The lease begins anew, since the process was asked for just now."""
        self.renew()
        self._processes.add(psutil.Process(pid))
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="lease", daemon=True)
            self._watching.start()

    def _watch(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(self._look_s)
            now = time.monotonic()
            if now - began > self._look_s + STOPPED_S:  # a word that came meanwhile was not heard yet
                self.renew()
            elif now - self._renewed > self._lease_s:
                self._end()

    def _end(self) -> None:
        ended, self._processes = self._processes, set()
        for process in ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
