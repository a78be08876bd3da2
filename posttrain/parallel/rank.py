"""The process of one rank: it joins the other ranks, makes the object that was asked for, and calls its methods."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from posttrain.actors.garbage import large_imports
from posttrain.actors.processes import place_of_this
from posttrain.hosts.away import enroll_now
from posttrain.hosts.placement import in_cluster, this_interface


class Rank:
    """The process of one rank."""

    def __init__(self, threads: int, folder: str) -> None:
        """threads: of torch. folder: paths in arguments may be relative to it, on a host that has it."""
        if in_cluster():
            enroll_now()
        if in_cluster() and (interface := this_interface()):  # that by which other hosts reach this one
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        if os.path.isdir(folder):
            os.chdir(folder)
        # torch is not imported yet. An actor with a `runtime_env` would not get a process that Ray has started already.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if threads == 1:  # if there are more later (`set_threads`), they wait without taking a core from engines
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self._made: Any = None
        # Until the object is made. Ray imports what its arguments need before it calls `start`.
        self._imports = contextlib.ExitStack()
        self._imports.enter_context(large_imports())

    def meeting_point(self) -> tuple[str, int]:
        """The address of this host, and a free port of it."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as server:
            server.bind((address, 0))
            return address, server.getsockname()[1]

    def place(self) -> tuple[str, int]:
        """The Ray node and the process id of this process, with which `kill_process` can end it."""
        return place_of_this()

    def start(
        self, place: tuple[int, int], meeting: tuple[str, int], make: Callable[..., Any], *arguments: Any
    ) -> None:
        """Join the other ranks and make the object. place: (number of this rank, number of ranks)."""
        from posttrain.parallel.engine import join_ranks

        with self._imports:
            join_ranks(*place, meeting)
            self._made = make(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._made, method)(*arguments)
