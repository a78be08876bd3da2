"""The rollout workers: engines that are fed and emptied in batches, take new weights, and are replaced when lost.

    send ──► lane ──► engine ──► lane ──► pieces ──► finished group
              ▲          │ SIGKILL, SIGSTOP, a deadline passed: another engine takes the newest weights,
              └──────────┘ and the replies go on where they stood, there or on another worker

What waits for what: each worker has a lane to its engine (actors/lane.py), which hands over requests and fetches pieces
in batches; nothing waits for a whole group. Each wait has a deadline.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from posttrain.actors.calls import await_call, await_with_heartbeat
from posttrain.actors.lane import COLLECT_S, Lane
from posttrain.actors.losses import MAX_CONSECUTIVE_LOSSES, is_loss, reason_of, root_of
from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.rl.records import DrawnPrompt, LedgerEvent
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.requests import Completion, Piece, SampleRequest
from posttrain.sampling.stream import join_spans

SUBMIT_GROUPS = 256


Collected = tuple[list[Piece], float]  # of `EngineActor.collect`: pieces, and the Unix time


@dataclass(slots=True)
class Flight:
    """A group that is being sampled. request: for the whole group, from the start. replies: what is there of each.

    stamp: no worker of an older policy version may sample for it. version: if given, only the worker that is kept at
    it may. Groups with an order below 0 are beside the training (side.py).
    """

    order: int
    stamp: int
    prompt: DrawnPrompt
    request: SampleRequest
    replies: list[Completion]
    began: float = 0.0
    worker: str = ""
    version: int | None = None
    indices: tuple[int, ...] = ()  # of the replies that the engine was last asked for

    def rest(self) -> SampleRequest:
        """The request for what is missing."""
        self.indices = tuple(index for index, reply in enumerate(self.replies) if not reply.finish_reason)
        if not any(reply.token_ids for reply in self.replies):
            return self.request
        return replace(self.request, begun=tuple(self.replies[index].token_ids for index in self.indices))

    def take(self, piece: Piece) -> bool:
        """Put a piece in its place; True if the group is finished."""
        index = self.indices[piece.index]
        before = self.replies[index]
        if piece.start != len(before.token_ids):
            raise StageError(f"group {self.order}: a piece starts at {piece.start}, not at {len(before.token_ids)}")
        self.replies[index] = Completion(
            before.token_ids + piece.token_ids,
            piece.text,
            before.logprobs + piece.logprobs,
            piece.finish_reason,
            join_spans((*before.versions, *piece.versions)),
        )
        return bool(piece.finish_reason) and all(reply.finish_reason for reply in self.replies)


@dataclass(slots=True, eq=False)
class Worker:
    """One engine: `policy_version` is the one that it samples with; `flights` are the groups it was given.

    is_kept: it takes no new weights for now. num_losses: engines lost in a row, without a finished group in between.
    """

    name: str
    actor: Any
    policy_version: int
    log: BusyLog
    is_alive: bool = True
    is_kept: bool = False
    flights: dict[int, Flight] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one taking of weights at a time
    num_losses: int = 0
    lane: Lane[Flight, Collected] = field(init=False)


class RolloutWorkers:
    """Feeds the engines, which hold `version`, whose weights are `manifest`.

    calls: see `weights.update_calls`. finished: hears of each group whose replies are all there. begun:
    hears of each group that has more of them. told: hears of events for the log. wave_seed: if given, groups are
    sampled in deterministic waves: all that were sent in one go, and none before the wave is finished.
    """

    def __init__(
        self,
        context: StageContext,
        engines: Engines,
        manifest: Manifest,
        version: int,
        calls: Callable[[Manifest, int], list[list[tuple[int, dict[str, Any]]]]],
        deadline_s: float,
        finished: Callable[[Flight, float], None],
        begun: Callable[[Flight], None],
        told: Callable[[LedgerEvent, Any], None],
        wave_seed: int | None = None,
    ):
        self._context = context
        self._engines = engines
        self._calls = calls
        self._deadline_s = deadline_s
        self._finished = finished
        self._begun = begun
        self._told = told
        self._wave_seed = wave_seed
        self._newest = (manifest, version)
        self._unsent: list[Flight] = []
        self.num_replaced = 0
        self.workers = [
            Worker(name, actor, version, BusyLog(context, name, "generate"))
            for name, actor in zip(engines.names, engines.actors, strict=True)
        ]
        for worker in self.workers:
            worker.lane = self._lane_to(worker)

    @property
    def oldest_version(self) -> int:
        """The oldest version that a group which is sent now may be sampled with."""
        alive = [worker.policy_version for worker in self.workers if worker.is_alive]
        return min(alive or [worker.policy_version for worker in self.workers])

    async def run(self) -> None:
        """Serve until cancelled; raises what cannot be mended."""
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self.workers:
                    group.create_task(self._serve(worker))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for worker in self.workers:
                worker.log.flush()
            await asyncio.gather(*(self._leave(worker) for worker in self.workers), return_exceptions=True)

    async def _leave(self, worker: Worker) -> None:
        """Nothing of ours is left in the engine: its next user has keys of its own."""
        if worker.is_alive:
            await await_call(
                worker.actor.forget.remote(), self._deadline_s, f"{worker.name} did not forget its requests"
            )

    def send(self, flight: Flight) -> None:
        """Have a group sampled by the worker with the fewest of those that may."""
        if flight.version is None:
            able = [worker for worker in self.workers if worker.is_alive and worker.policy_version >= flight.stamp]
        else:
            able = [worker for worker in self.workers if worker.is_kept and worker.policy_version == flight.version]
        if not able:
            if flight.version is None:  # else nobody can sample it any more, which whoever sent it looks for
                self._unsent.append(flight)
            return
        worker = min(able, key=lambda worker: len(worker.flights))
        flight.worker, flight.began = worker.name, flight.began or time.time()
        worker.flights[flight.order] = flight
        worker.lane.send(flight)

    def cancel(self, order: int) -> Flight | None:
        """Stop sampling for a group; returns what there was of it."""
        waiting = [flight for flight in self._unsent if flight.order == order]
        self._unsent = [flight for flight in self._unsent if flight.order != order]
        for worker in self.workers:
            if (flight := worker.flights.pop(order, None)) is not None:
                waiting.append(flight)
                worker.lane.withdraw(lambda flight: flight.order == order)
                if worker.is_alive:
                    worker.actor.cancel.remote([order])
        return waiting[0] if waiting else None

    def _send_waiting(self) -> None:
        unsent, self._unsent = self._unsent, []
        for flight in unsent:
            self.send(flight)

    # ------------------------------------------------------------------ weights

    def update(self, manifest: Manifest, version: int) -> Coroutine[Any, Any, None]:
        """Have every worker take a version; one that is being replaced takes it when it starts, one that is kept at
        its version when it is released."""
        self._newest = (manifest, version)  # set before anything is awaited: a replaced engine then loads this version
        return self._update_all(manifest, version)

    async def _update_all(self, manifest: Manifest, version: int) -> None:
        for together in self._calls(manifest, version):
            await asyncio.gather(*(self._update(self.workers[index], arguments) for index, arguments in together))

    async def _update(self, worker: Worker, arguments: dict[str, Any]) -> None:
        async with worker.lock:
            version = arguments["policy_version"]
            if not worker.is_alive or worker.is_kept or worker.policy_version >= version:
                return
            try:
                began, ended = await self._await_busy(worker, worker.actor.update_weights.remote(**arguments))
            except Exception as error:
                if not is_loss(error):
                    raise
                worker.lane.fail(error)  # the lane may have nothing to send by which it would find out
                return
            worker.policy_version = version
        self._told(LedgerEvent.WEIGHTS_TAKEN, [worker.name, version])
        self._context.busy(worker.name, "update_weights", start=began, end=ended)
        self._send_waiting()

    async def settled(self) -> None:
        """Until nobody reads weights, so that the trainer may write over those before the newest."""
        while busy := [worker for worker in self.workers if worker.lock.locked()]:
            async with busy[0].lock:
                pass

    def newest(self) -> Worker | None:
        """The worker of the newest version among those that are not taking weights, if there is one."""
        able = [worker for worker in self.workers if worker.is_alive and not worker.lock.locked()]
        return max(able, key=lambda worker: worker.policy_version, default=None)

    async def release(self, worker: Worker) -> None:
        """Let a worker that was kept take the newest weights."""
        worker.is_kept = False
        calls = [call for together in self._calls(*self._newest) for call in together]
        await self._update(worker, dict(calls)[self.workers.index(worker)])

    # ------------------------------------------------------------------ requests and replies

    async def _serve(self, worker: Worker) -> None:
        """Work, and mend what can be mended, without end."""
        cause: BaseException | None = None
        while True:
            try:
                if cause is not None:
                    await self._replace(worker, cause)
                if self._wave_seed is not None:
                    await self._sample_waves(worker, self._wave_seed)
                await worker.lane.serve()
            except Exception as error:  # a replacement may be lost too, before it serves
                cause = root_of(error)
                if not is_loss(cause):
                    raise cause from None

    def _lane_to(self, worker: Worker) -> Lane[Flight, Collected]:
        return Lane(
            lambda flights: worker.actor.submit.remote([(flight.order, flight.rest()) for flight in flights]),
            lambda: worker.actor.collect.remote(COLLECT_S),
            lambda collected: self._take(worker, *collected),
            deadline_s=3 * self._deadline_s,
            name=lambda: f"{worker.name} (policy version {worker.policy_version})",
            batch_size=SUBMIT_GROUPS if self._wave_seed is None else None,
        )

    def _take(self, worker: Worker, pieces: list[Piece], now: float) -> None:
        grown: dict[int, Flight] = {}
        for piece in pieces:
            flight = worker.flights.get(piece.key)
            if flight is None:  # cancelled
                continue
            if flight.take(piece):
                self._finish(worker, flight, now)
                grown.pop(piece.key, None)
            else:
                grown[piece.key] = flight
        for flight in grown.values():
            self._begun(flight)

    def _finish(self, worker: Worker, flight: Flight, now: float) -> None:
        del worker.flights[flight.order]
        worker.num_losses = 0
        worker.log.add(flight.began, now)
        self._finished(flight, now)

    async def _sample_waves(self, worker: Worker, seed: int) -> None:
        """Deterministic: the wave's seed is of its first group, whatever happened before."""
        while True:
            flights = await worker.lane.next_batch()
            requests = [flight.rest() for flight in flights]
            wave = worker.actor.generate_wave.remote(requests, wave_seed(seed, flights[0].order))
            replies, _, ended = await self._await_busy(worker, wave)
            for flight, completions in zip(flights, replies, strict=True):
                flight.replies = list(completions)
                self._finish(worker, flight, ended)

    async def _await_busy(self, worker: Worker, call: Any) -> Any:
        """The result of a call that may take long, of an actor that must answer meanwhile."""
        name = f"{worker.name} (policy version {worker.policy_version})"
        return await await_with_heartbeat(call, worker.actor.pids.remote, 3 * self._deadline_s, name=name)

    # ------------------------------------------------------------------ a lost engine

    async def _replace(self, worker: Worker, cause: BaseException) -> None:
        """Another engine under the worker; its groups go on where they stand, on whichever worker is there first."""
        worker.is_alive = worker.is_kept = False
        worker.num_losses += 1
        self.num_replaced += 1
        reason = reason_of(cause)
        if worker.num_losses >= MAX_CONSECUTIVE_LOSSES:
            raise StageError(
                f"{worker.name} was lost {MAX_CONSECUTIVE_LOSSES} times in a row; the last time: {reason}"
            ) from cause
        self._told(LedgerEvent.ENGINE_REPLACED, [worker.name, reason])
        self._unsent += worker.flights.values()
        worker.flights, worker.lane = {}, self._lane_to(worker)
        self._send_waiting()
        index = self.workers.index(worker)
        worker.name, worker.actor = await self._engines.replace(index, cause)
        async with worker.lock:  # an update waits for it, so that the trainer does not write over what is read here
            calls = [call for together in self._calls(*self._newest) for call in together]
            arguments = dict(calls)[index]
            await self._await_busy(worker, worker.actor.update_weights.remote(**arguments))
            worker.policy_version = version = arguments["policy_version"]
            worker.is_alive = True
        self._told(LedgerEvent.WEIGHTS_TAKEN, [worker.name, version])
        self._send_waiting()


def wave_seed(seed: int, order: int) -> int:
    """The seed of the wave whose first group is `order`."""
    return (seed * 1_000_003 + order) % 2**31
