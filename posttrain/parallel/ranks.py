"""Ranks of one training: Ray actors that meet, and are then called as one.

    caller ──► RankGroup.get("step") ──┬──► rank 0 ─┐
                                       ├──► rank 1 ─┤ collectives (gloo on CPUs, NCCL on GPUs)
                                       └──► ...    ─┘
           ◄── rank 0's answer, or the first failure of any rank

A rank that fails leaves the others waiting in a collective; its error is raised at once and `close` ends them all.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.actors.processes import kill_process, place_of_this
from posttrain.config.shared import ParallelConfig, TrainerResources
from posttrain.errors import StageError

PLACE_S = 180.0
START_S = 1800.0
LAST_S = 10.0


class _Rank:
    """The process of one rank."""

    def __init__(self) -> None:
        self._made: Any = None

    def meeting_point(self) -> tuple[str, int]:
        """An address of this host, and a port that is free there."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as server:
            server.bind((address, 0))
            return address, server.getsockname()[1]

    def place(self) -> tuple[str, int]:
        """This process, for who must end it."""
        return place_of_this()

    def start(
        self, place: tuple[int, int], meeting: tuple[str, int], make: Callable[..., Any], *arguments: Any
    ) -> None:
        """Become one of the ranks and make the object. place: this rank, and how many there are."""
        from posttrain.parallel.engine import join_ranks

        join_ranks(*place, meeting)
        self._made = make(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._made, method)(*arguments)


class RankGroup:
    """The processes that `parallel` asks for; must be used inside an initialised Ray session.

    In each, once all have met, `make(*arguments)` gives the object whose methods are called. The processes start in
    the background; the first call waits for them, and raises `StageError` if they find no place on the cluster.
    deadline_s: a call that takes longer means that a rank is lost; None: there is no limit. name: what they are, for
    messages. lost: raised when a rank has died, or did not answer in time.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        resources: TrainerResources,
        make: Callable[..., Any],
        *arguments: Any,
        deadline_s: float | None = None,
        name: str = "the training",
        lost: type[StageError] = StageError,
    ):
        import ray

        self._deadline_s = deadline_s
        self._name = name
        self._lost = lost
        self._resources = resources
        threads = str(max(1, int(resources.cpus)))
        actor = ray.remote(_Rank).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        self._ranks: list[Any] = [actor.remote() for _ in range(parallel.processes)]
        self._points = [rank.meeting_point.remote() for rank in self._ranks]
        self._places = [rank.place.remote() for rank in self._ranks]
        shared = [ray.put(argument) for argument in (make, *arguments)]
        self._starts = [
            rank.start.remote((index, parallel.processes), self._points[0], *shared)
            for index, rank in enumerate(self._ranks)
        ]

    def get(self, method: str, *arguments: Any) -> Any:
        """Call a method on every rank and wait; returns rank 0's answer."""
        with self._losses(method):
            self._await_start()
            return _wait(self._submit(method, arguments), self._deadline_s, method)[0]

    async def call(self, method: str, *arguments: Any) -> Any:
        """As `get`, for a caller that has other things to do meanwhile."""
        with self._losses(method):
            self._await_start()
            answers = [asyncio.ensure_future(reference) for reference in self._submit(method, arguments)]
            try:
                # Not wait_for: where this process itself was stopped meanwhile, the answers are there when time is up.
                done, waiting = await asyncio.wait(
                    answers, timeout=self._deadline_s, return_when=asyncio.FIRST_EXCEPTION
                )
                failures = [error for answer in done if (error := answer.exception()) is not None]
                if failures:
                    raise failures[0]
                if waiting:
                    raise _late(len(waiting), len(answers), method, deadline_s=self._deadline_s)
                return answers[0].result()
            finally:
                for answer in answers:
                    answer.cancel()

    @contextlib.contextmanager
    def _losses(self, method: str) -> Iterator[None]:
        """A rank that is gone, or silent for too long, as `lost`."""
        from ray.exceptions import RayActorError

        try:
            yield
        except (RayActorError, TimeoutError) as error:
            raise self._lost(f"{self._name} was lost in {method}: {' '.join(str(error).split())}") from error

    def _submit(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        import ray

        shared = [ray.put(argument) for argument in arguments]
        return [rank.call.remote(method, *shared) for rank in self._ranks]

    def _await_start(self) -> None:
        import ray

        if not self._starts:
            return
        placed, waiting = ray.wait(self._points, num_returns=len(self._points), timeout=PLACE_S)
        if waiting:
            raise StageError(
                f"only {len(placed)} of {len(self._points)} ranks found a place within {PLACE_S:g} s, each with "
                f"{self._resources.cpus:g} CPU and {self._resources.gpus:g} GPU; lower resources.trainer or "
                "parallel.processes"
            )
        _wait(self._starts, START_S, "its start")
        self._starts = []

    def close(self, last: str | None = None) -> None:
        """End every rank, frozen ones too.

        last: a method to call before, where all have started; ranks that fail to answer are ended all the same.
        """
        import ray
        from ray.exceptions import RayError

        if last is not None and not self._starts:
            ray.wait(self._submit(last, ()), num_returns=len(self._ranks), timeout=LAST_S)
        for rank in self._ranks:
            ray.kill(rank)
        for place in ray.wait(self._places, num_returns=len(self._ranks), timeout=0)[0] if self._ranks else []:
            # ray.kill does not end a process that is stopped (SIGSTOP), so each rank is killed by its process id too.
            with contextlib.suppress(RayError):  # the rank died before it reported its process id
                kill_process(*ray.get(place))
        self._ranks = []


def _wait(references: list[Any], deadline_s: float | None, what: str) -> list[Any]:
    """Results in order; the first failure is raised as soon as it is there, TimeoutError when time is up."""
    import ray

    end = None if deadline_s is None else time.monotonic() + deadline_s
    waiting = list(references)
    while waiting:
        left = None if end is None else max(0.0, end - time.monotonic())
        done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        if not done:
            raise _late(len(waiting), len(references), what, deadline_s=deadline_s)
        ray.get(done)
    return ray.get(references)


def _late(waiting: int, ranks: int, what: str, *, deadline_s: float | None) -> TimeoutError:
    return TimeoutError(f"{waiting} of {ranks} ranks did not finish {what} in {deadline_s:g} s")


class _Work:
    """A function as the object of a `RankGroup`, for work that is one call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._function = function
        self._arguments = arguments

    def run(self) -> Any:
        return self._function(*self._arguments)


def run_on_ranks(
    parallel: ParallelConfig, resources: TrainerResources, function: Callable[..., Any], *arguments: Any
) -> Any:
    """`function(*arguments)` on every rank at the same time; returns rank 0's result."""
    group = RankGroup(parallel, resources, _Work, function, *arguments)
    try:
        return group.get("run")
    finally:
        group.close()
