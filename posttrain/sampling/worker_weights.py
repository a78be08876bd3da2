"""Which weights the workers have, and how they take newer ones while they sample."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from posttrain.actors.losses import is_loss
from posttrain.context import StageContext
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.roads import chained
from posttrain.sampling.worker import Worker

UpdateCalls = list[list[tuple[int, dict[str, Any]]]]  # see `rl.rollouts.weights.update_calls`


class CallsOf(Protocol):
    """Gives the calls by which the engines of some seats load a version."""

    def __call__(self, manifest: Manifest, version: int, /, *, seats: Sequence[int]) -> UpdateCalls:
        """The calls, in the order in which they are made."""
        ...


class WorkerWeights:
    """The newest weights, `manifest` of policy version `version` at first, and who has them.

    calls: gives the calls by which engines load a version. calls and manifest are None if the weights never change.
    taken: called with each worker that has loaded a version.
    """

    def __init__(
        self,
        context: StageContext,
        workers: Sequence[Worker],
        *,
        calls: CallsOf | None,
        manifest: Manifest | None,
        version: int,
        taken: Callable[[Worker], None],
    ):
        self._context = context
        self._workers = workers
        self._calls = calls
        self._newest = (manifest, version)
        self._taken = taken

    def update(self, manifest: Manifest, version: int, again: bool = False) -> Coroutine[Any, Any, None]:
        """Have every worker load a version. A worker whose engine is being replaced loads it when the engine starts,
        and a worker that is kept at its version loads it when it is released.

        again: also a worker that has the version loads it, from `manifest`.
        """
        assert self._calls is not None
        self._newest = (manifest, version)  # set before anything is awaited: a replaced engine then loads this version
        return self._update_all(self._calls(manifest, version, seats=self._seats()), again)

    async def settled(self) -> None:
        """Wait until no engine is loading weights. The trainer may then overwrite those before the newest."""
        while busy := [worker for worker in self._workers if worker.lock.locked()]:
            async with busy[0].lock:
                pass

    def newest(self) -> Worker | None:
        """The worker with the newest version of those that are not kept or loading weights; None if there is none."""
        able = [worker for worker in self._takers() if not worker.lock.locked()]
        return max(able, key=lambda worker: worker.policy_version, default=None)

    async def release(self, worker: Worker) -> None:
        """End the keeping of a worker, and have it load the newest weights."""
        worker.is_kept = False
        arguments = self._arguments_for(worker)
        if arguments is not None:
            await self._update(worker, arguments)

    async def begin(self, worker: Worker) -> None:
        """Have a new engine load the newest weights. The worker is alive then."""
        async with worker.lock:
            await self._load(worker)
            worker.is_alive = True
        self._taken(worker)

    async def load(self, worker: Worker) -> None:
        """Have a new engine load the newest weights, without being alive."""
        async with worker.lock:  # `settled` waits for the lock, so that the trainer does not overwrite these weights
            await self._load(worker)

    async def _load(self, worker: Worker) -> None:
        if (arguments := self._arguments_for(worker)) is not None:
            await worker.await_busy(worker.actor.update_weights.remote(**arguments))
            worker.policy_version = arguments["policy_version"]

    def _seats(self) -> list[int]:
        return [worker.seat for worker in self._workers]

    async def _update_all(self, calls: UpdateCalls, again: bool) -> None:
        for together in self._chained(calls):
            await asyncio.gather(*(self._update(worker, arguments, again) for worker, arguments in together))

    async def _update(self, worker: Worker, arguments: dict[str, Any], again: bool = False) -> None:
        async with worker.lock:
            version = arguments["policy_version"]
            if not worker.is_alive or worker.is_kept or worker.policy_version >= version + again:
                return
            try:
                updated = await worker.await_busy(worker.actor.update_weights.remote(**arguments))
            except Exception as error:
                if not is_loss(error):
                    raise
                worker.lane.fail(error)  # the lane may have nothing to send by which it would find out
                return
            worker.policy_version = version
        self._context.busy(worker.name, "update_weights", start=updated.began, end=updated.ended)
        self._context.event("engine_steps", engine=worker.name, sums=updated.step_sums)
        self._taken(worker)

    def _arguments_for(self, worker: Worker) -> dict[str, Any] | None:
        """The arguments of the call by which a worker loads the newest weights; None if weights never change."""
        manifest, version = self._newest
        if self._calls is None or manifest is None:
            return None
        ((_, arguments),) = (
            call for together in self._calls(manifest, version, seats=[worker.seat]) for call in together
        )
        return self._linked(worker, arguments, self._takers())

    def _takers(self) -> list[Worker]:
        """The workers that load a new version when it is published, in the order of the chain of their hosts."""
        return [worker for worker in self._workers if worker.is_alive and not worker.is_kept]

    def _chained(self, calls: UpdateCalls) -> list[list[tuple[Worker, dict[str, Any]]]]:
        """The calls in which each host gets the weights from the hosts before it (roads.py)."""
        takers, by_seat = self._takers(), {worker.seat: worker for worker in self._workers}
        return [
            [
                (worker, self._linked(worker, arguments, takers[: takers.index(worker)] if worker in takers else ()))
                for seat, arguments in together
                for worker in (by_seat[seat],)
            ]
            for together in calls
        ]

    def _linked(self, worker: Worker, arguments: dict[str, Any], before: Sequence[Worker]) -> dict[str, Any]:
        if worker.place is None:
            return arguments
        places = [other.place for other in before if other.place is not None]
        return {**arguments, "source": chained(arguments["source"], worker.place, places)}
