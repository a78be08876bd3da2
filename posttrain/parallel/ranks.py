"""Start the ranks of one training as Ray actors, and call a method on all of them at once.

    caller ──► RankGroup.get("step") ──┬──► rank 0 ─┐
                                       ├──► rank 1 ─┤ collectives (gloo on CPUs, NCCL on GPUs)
                                       └──► ...    ─┘
           ◄── rank 0's result, or the first error of any rank

If a rank fails, the others wait in a collective for ever. So the first error is raised at once, and `close` ends all
ranks. A rank whose host does not answer counts as lost long before Ray finds that out.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from posttrain.actors.losses import ActorLostError
from posttrain.actors.processes import kill_process
from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.errors import StageError
from posttrain.hosts.directory import directory
from posttrain.hosts.placement import RankPlaces
from posttrain.parallel.rank import Rank

SUSPICION_S = 1.0  # between two looks at which hosts do not answer
PLACE_S = 180.0  # for Ray to place the ranks on the cluster
START_S = 1800.0  # for them to join and to make their objects: load the model, start the engine
LAST_S = 10.0  # for the last call before they are ended


class RankGroup:
    """The ranks that `parallel` asks for, one process each. Ray must be initialised.

    Once all ranks have joined, each makes an object by `make(*arguments)`; `get` and `call` call its methods. The ranks
    start in the background. The first call waits for them, and raises `StageError` if the cluster has no room for them.
    deadline_s: seconds after which a call counts as lost; None: no limit. name: what the ranks are, for messages.
    lost: the error that is raised if a rank has died or did not answer within the deadline.

    Example: `RankGroup(parallel, resources, PolicyTrainer, config, seed).get("step", samples, 0)`.
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
        threads = max(1, int(resources.cpus))
        self._hosts = directory()  # None in a local session
        avoided = ray.get(self._hosts.avoided.remote()) if self._hosts is not None else ()
        self._room = RankPlaces(resources, parallel.processes, avoided)
        actor = ray.remote(Rank)
        self._ranks: list[Any] = [
            actor.options(num_cpus=resources.cpus, num_gpus=resources.gpus, **place).remote(threads, os.getcwd())
            for place in self._room.options
        ]
        self._nodes: set[str] = set()  # of the ranks, once all are placed
        self._points = [rank.meeting_point.remote() for rank in self._ranks]
        self._places = [rank.place.remote() for rank in self._ranks]
        shared = [ray.put(argument) for argument in (make, *arguments)]
        self._starts = [
            rank.start.remote((index, parallel.processes), self._points[0], *shared)
            for index, rank in enumerate(self._ranks)
        ]

    def get(self, method: str, *arguments: Any) -> Any:
        """Call a method on every rank and wait. Returns the result of rank 0; raises the first error of any rank."""
        with self._losses(method):
            self._await_start()
            return self._wait(self._submit(method, arguments), self._deadline_s, method)[0]

    async def call(self, method: str, *arguments: Any) -> Any:
        """As `get`, but awaited, for a caller that does other work in the meantime."""
        with self._losses(method):
            await self._started()
            answers = [asyncio.ensure_future(reference) for reference in self._submit(method, arguments)]
            try:
                waiting = await self._answered(answers, self._deadline_s)
                if waiting:
                    raise _late(waiting, len(answers), method, deadline_s=self._deadline_s)
                return answers[0].result()
            finally:
                for answer in answers:
                    answer.cancel()

    async def _answered(self, answers: "Sequence[asyncio.Future[Any]]", deadline_s: float | None) -> int:
        """Wait for answers. Returns how many did not come in time. Raises the first error of any, and ActorLostError if
        the host of a rank does not answer.
        """
        end = None if deadline_s is None else time.monotonic() + deadline_s
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            # Not asyncio.wait_for: if this process itself was stopped for a while, the answers have arrived when the
            # time is up, and must count.
            done, waiting = await asyncio.wait(answers, timeout=self._look_s(left), return_when=asyncio.FIRST_EXCEPTION)
            failures = [error for answer in done if (error := answer.exception()) is not None]
            if failures:
                raise failures[0]
            if not waiting or left == 0.0:
                return len(waiting)
            if self._hosts is not None:
                self._check_hosts(await self._hosts.avoided.remote())

    def _look_s(self, left: float | None) -> float | None:
        """How long to wait before the hosts are looked at. left: seconds until the deadline."""
        if self._hosts is None:
            return left
        return SUSPICION_S if left is None else min(SUSPICION_S, left)

    def _check_hosts(self, suspected: frozenset[str]) -> None:
        if self._nodes & suspected:
            raise ActorLostError("the host of a rank does not answer")

    @contextlib.contextmanager
    def _losses(self, method: str) -> Iterator[None]:
        """Raise `lost` in place of the error of a rank that has died or did not answer in time."""
        from ray.exceptions import RayActorError

        try:
            yield
        except (RayActorError, ActorLostError, TimeoutError) as error:
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
            raise self._no_room(len(placed))
        self._nodes = {node for node, _ in ray.get(self._places)}
        self._wait(self._starts, START_S, "its start")
        self._starts = []

    async def _started(self) -> None:
        """As `_await_start`, but awaited."""
        if not self._starts:
            return
        placed, waiting = await asyncio.wait([_answer(point) for point in self._points], timeout=PLACE_S)
        if waiting:
            raise self._no_room(len(placed))
        self._nodes = {node for node, _ in await asyncio.gather(*map(_answer, self._places))}
        starts = [_answer(start) for start in self._starts]
        if waiting := await self._answered(starts, START_S):
            raise _late(waiting, len(starts), "its start", deadline_s=START_S)
        self._starts = []

    def _no_room(self, placed: int) -> StageError:
        return StageError(
            f"only {placed} of {len(self._points)} ranks were placed on the cluster within {PLACE_S:g} s, "
            f"each with {self._resources.cpus:g} CPU and {self._resources.gpus:g} GPU; lower resources.trainer or "
            "parallel.processes"
        )

    def close(self, last: str | None = None) -> None:
        """End every rank, frozen ones too.

        last: a method to call on the ranks before they are ended, if they have started. A rank that does not answer is
        ended too.
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
                self._kill(*ray.get(place))
        self._ranks = []
        self._room.close()

    def _kill(self, node: str, pid: int) -> None:
        """End a rank for certain: at once, or as soon as its host answers again."""
        import ray

        if self._hosts is None:
            kill_process(node, pid)
        else:
            ray.get(self._hosts.fence.remote(node, pid))

    def _wait(self, references: list[Any], deadline_s: float | None, what: str) -> list[Any]:
        """The results in order. Raises the first error as soon as it arrives, and TimeoutError after the deadline."""
        import ray

        end = None if deadline_s is None else time.monotonic() + deadline_s
        waiting = list(references)
        while waiting:
            left = None if end is None else max(0.0, end - time.monotonic())
            done, waiting = ray.wait(waiting, num_returns=1, timeout=self._look_s(left))
            ray.get(done)
            if not done and left == 0.0:
                raise _late(len(waiting), len(references), what, deadline_s=deadline_s)
            if not done and self._hosts is not None:
                self._check_hosts(ray.get(self._hosts.avoided.remote()))
        return ray.get(references)


def _answer(reference: Any) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(reference)


def _late(waiting: int, ranks: int, what: str, *, deadline_s: float | None) -> TimeoutError:
    return TimeoutError(f"{waiting} of {ranks} ranks did not finish {what} in {deadline_s:g} s")


class _Work:
    """The object of a `RankGroup` whose work is one function call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._function = function
        self._arguments = arguments

    def run(self) -> Any:
        return self._function(*self._arguments)


def run_on_ranks(
    parallel: ParallelConfig,
    resources: TrainerResources,
    function: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """Call `function(*arguments)` on every rank at the same time, and return the result of rank 0."""
    group = RankGroup(parallel, resources, _Work, function, *arguments)
    try:
        return group.get("run")
    finally:
        group.close()
