"""Ranks of one training: Ray actors that meet, and are then called as one.

    stage ──► RankGroup.get("run")        ──► rank 0 ─┐
                                         ├──► rank 1 ─┤ collectives (gloo on CPUs, NCCL on GPUs)
                                 └──► ...    ─┘
          ◄── rank 0's answer, or the first failure of any rank

A rank that fails leaves the others waiting in a collective; its error is raised at once and `close` ends them all.
"""

import socket
from collections.abc import Callable
from typing import Any

from posttrain.config.shared import ParallelConfig, TrainerResources
from posttrain.errors import StageError

PLACE_S = 180.0


class _Rank:
    """The process of one rank; `make(*arguments)` gives the object whose methods are called."""

    def __init__(self) -> None:
        self._made: Any = None

    def meeting_point(self) -> tuple[str, int]:
        """An address of this host, and a port that is free there."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as server:
            server.bind((address, 0))
            return address, server.getsockname()[1]

    def start(self, seat: tuple[int, int, str, int] | None, make: Callable[..., Any], arguments: tuple) -> None:
        if seat is not None:
            from posttrain.parallel.engine import join_ranks

            join_ranks(*seat)
        self._made = make(*arguments)

    def run(self, method: str, arguments: tuple) -> Any:
        return getattr(self._made, method)(*arguments)


class RankGroup:
    """One process, or as many as `parallel` says; must be used inside an initialised Ray session.

    make: called in each process with `arguments`, after the ranks have met (`parallel` None: there is nobody to meet).
    """

    def __init__(
        self, parallel: ParallelConfig | None, resources: TrainerResources, make: Callable[..., Any], *arguments: Any
    ):
        import ray

        world = 1 if parallel is None else parallel.processes
        threads = str(max(1, int(resources.cpus)))
        actor = ray.remote(_Rank).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        self._actors: list[Any] = [actor.remote() for _ in range(world)]
        try:
            seats: list[Any] = [None]
            if parallel is not None:
                meeting = self._place(resources)
                seats = [(rank, world, *meeting) for rank in range(world)]
            shared = [ray.put(argument) for argument in arguments]
            _wait([
                rank.start.remote(seat, _with_fetched(make), (shared,))
                for rank, seat in zip(self._actors, seats, strict=True)
            ])  # fmt: skip
        except BaseException:
            self.close()
            raise

    def _place(self, resources: TrainerResources) -> tuple[str, int]:
        """Wait until every rank has its place on the cluster; returns where they are to meet."""
        import ray

        points = [rank.meeting_point.remote() for rank in self._actors]
        placed, waiting = ray.wait(points, num_returns=len(points), timeout=PLACE_S)
        if waiting:
            raise StageError(
                f"only {len(placed)} of {len(points)} ranks found a place within {PLACE_S:g} s, each with "
                f"{resources.cpus:g} CPU and {resources.gpus:g} GPU; lower resources.trainer or parallel.processes"
            )
        return ray.get(points[0])

    def get(self, method: str, *arguments: Any) -> Any:
        """Call a method on every rank and wait; returns rank 0's answer."""
        return _wait(self._submit(method, arguments))[0]

    def _submit(self, method: str, arguments: tuple) -> list[Any]:
        return [rank.run.remote(method, arguments) for rank in self._actors]

    def close(self) -> None:
        """End every rank."""
        import ray

        for rank in self._actors:
            ray.kill(rank)
        self._actors = []


def _with_fetched(make: Callable[..., Any]) -> Callable[..., Any]:
    def fetched(references: list[Any]) -> Any:
        import ray

        return make(*ray.get(references))

    return fetched


def _wait(references: list[Any]) -> list[Any]:
    """Results in order; the first failure is raised as soon as it is there."""
    import ray

    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        ray.get(done)
    return ray.get(references)


class Task:
    """A function as the object of a `RankGroup`, for work that is one call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._function = function
        self._arguments = arguments

    def run(self) -> Any:
        """Call it."""
        return self._function(*self._arguments)


def run_on_ranks(
    parallel: ParallelConfig, resources: TrainerResources, function: Callable[..., Any], *arguments: Any
) -> Any:
    """`function(*arguments)` on every rank at the same time; returns rank 0's result."""
    group = RankGroup(parallel, resources, Task, function, *arguments)
    try:
        return group.get("run")
    finally:
        group.close()
