"""The rollout workers: engines that are fed and emptied in batches, take new weights, and are replaced when lost.

    send ──► rollouters ──► turns ──► lane ──► engine ──► lane ──► pieces ──► turns ──► rollouters ──► finished group
              one for each             ▲          │ SIGKILL, SIGSTOP, a deadline passed: another engine takes the
              rollout                  └──────────┘ newest weights, and the turns go on where they stood, there or on
                                                    another worker

What waits for what: a rollouter waits for its turn (running.py). Each worker has a lane to its engine
(actors/lane.py), which sends requests and fetches pieces in batches. Nothing waits for a whole group. Each wait on an
engine has a deadline.

The turns that a group's rollouters ask for in one round, and that begin with the same tokens, are
one request: at the first turn the whole group, whose prompt the engine then prepares once.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from posttrain.actors.calls import await_with_heartbeat
from posttrain.actors.lane import COLLECT_S, Lane
from posttrain.actors.losses import MAX_CONSECUTIVE_LOSSES, ActorLostError, is_loss, reason_of, root_of
from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.requests import Piece, SampleRequest
from posttrain.sampling.rollouter import Flight, Rollouter, SingleTurn, Turn
from posttrain.sampling.running import RunningRollouters

SUBMIT_REQUESTS = 256
TURN_SEEDS = 998_244_353  # apart, so that no later turn has the seed of another group's first one

Collected = tuple[list[Piece], float]  # of `EngineActor.collect`: pieces, and the Unix time
UpdateCalls = list[list[tuple[int, dict[str, Any]]]]  # see `rl.rollouts.weights.update_calls`


@dataclass(slots=True, eq=False)
class Ask:
    """What one request to an engine is for: turns of one group that begin with the same tokens.

    key: the key under which the engine gets it. waiting: the turns that the latest request to an engine asks for, in
    the order of its replies. began_s: Unix time at which it was first sent.
    """

    key: int
    turns: list[Turn]
    waiting: list[Turn] = field(default_factory=list)
    began_s: float = 0.0

    @property
    def flight(self) -> Flight:
        """The group of the turns."""
        return self.turns[0].flight

    def rest(self) -> SampleRequest:
        """The request for the turns, or parts of turns, that are not sampled yet."""
        self.waiting = [turn for turn in self.turns if not turn.completion.finish_reason]
        request = self.turns[0].request
        if any(turn.completion.token_ids for turn in self.waiting):
            return replace(request, begun=tuple(turn.completion.token_ids for turn in self.waiting))
        return request if request.n == len(self.waiting) else replace(request, n=len(self.waiting))

    @property
    def is_finished(self) -> bool:
        """Whether every turn is sampled."""
        return all(turn.completion.finish_reason for turn in self.turns)


@dataclass(slots=True, eq=False)
class Worker:
    """One place for an engine. If the engine is lost, another takes its place and the worker stays.

    policy_version: the version that the engine samples with. asks: the requests that it has, by key. is_kept: whether
    it keeps its version for now. num_losses: engines lost in a row, without a finished request in between.
    """

    name: str
    actor: Any
    policy_version: int
    log: BusyLog
    is_alive: bool = True
    is_kept: bool = False
    asks: dict[int, Ask] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the engine loads weights
    num_losses: int = 0
    lane: Lane[Ask, Collected] = field(init=False)


class RolloutWorkers:
    """Makes groups of rollouts with `rollouter` on the engines, which have the weights of policy version `version`.

    finished: called with each group whose rollouts are all finished. begun: called with each group that has new tokens.
    calls: gives the calls by which engines load a version. manifest: the weights of `version`. Both are None if the
    weights never change; an engine that replaces a lost one then has the weights of the model folder. took: called with
    the name of a worker and the version that it has loaded. replaced: called with the name of a worker and why its
    engine was lost. wave_seed: if given, turns are sampled in deterministic waves. A wave holds all turns that are
    waited for, and the next one starts when it is finished. wave_seed(first group of the wave) is its seed.
    """

    def __init__(
        self,
        context: StageContext,
        engines: Engines,
        *,
        deadline_s: float,
        finished: Callable[[Flight], None],
        begun: Callable[[Flight], None] | None = None,
        rollouter: Rollouter | None = None,
        calls: Callable[[Manifest, int], UpdateCalls] | None = None,
        manifest: Manifest | None = None,
        version: int = 0,
        took: Callable[[str, int], None] | None = None,
        replaced: Callable[[str, str], None] | None = None,
        wave_seed: Callable[[Flight], int] | None = None,
    ):
        self._context = context
        self._engines = engines
        self._deadline_s = deadline_s
        self._rollouters = RunningRollouters(rollouter or SingleTurn(), asked=self._send_asked, finished=finished)
        self._begun = begun
        self._calls = calls
        self._newest = (manifest, version)
        self._took = took
        self._replaced = replaced
        self._wave_seed = wave_seed
        # No other caller of a warm engine has the same keys. One that was killed may have left requests in it.
        self._next_key = secrets.randbits(48)
        self._asked: list[Turn] = []  # turns that rollouters have asked for and that are not sent yet
        self._unsent: list[Ask] = []  # requests that no worker may sample now
        self.num_replaced = 0
        self.workers = [
            Worker(name, actor, version, log, is_alive=engines.is_ready(index))
            for index, (name, actor, log) in enumerate(
                zip(engines.names, engines.actors, engines.logs.values(), strict=True)
            )
        ]
        for worker in self.workers:
            worker.lane = self._lane_to(worker)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that could sample for a group which is sent now."""
        alive = [worker.policy_version for worker in self.workers if worker.is_alive]
        return min(alive or [worker.policy_version for worker in self.workers])

    async def run(self) -> None:
        """Serve until cancelled. Raises an error that replacing an engine does not mend."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._rollouters.raise_failure())
                for worker in self.workers:
                    group.create_task(self._serve(worker))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for order in list(self.flights):
                self._rollouters.forget(order)
            for worker in self.workers:
                worker.log.flush()
            await asyncio.gather(*(self._leave(worker) for worker in self.workers), return_exceptions=True)

    async def _leave(self, worker: Worker) -> None:
        """Remove our requests from the engine, which may serve another caller next."""
        if worker.is_alive:
            await worker.lane.leave(worker.actor.forget.remote)

    # ------------------------------------------------------------------ groups

    @property
    def flights(self) -> dict[int, Flight]:
        """The groups in progress, by order."""
        return self._rollouters.flights

    def send(self, flight: Flight) -> None:
        """Have the rollouts of a group made."""
        self._rollouters.start(flight)

    def cancel(self, order: int) -> Flight | None:
        """Stop sampling for a group. Returns the group with the replies so far, or None if it is not in progress."""
        flight = self._rollouters.forget(order)
        if flight is None:
            return None
        self._asked = [turn for turn in self._asked if turn.flight is not flight]
        self._unsent = [ask for ask in self._unsent if ask.flight is not flight]
        for worker in self.workers:
            keys = [key for key in flight.keys if worker.asks.pop(key, None) is not None]
            if keys:
                worker.lane.withdraw(lambda ask: ask.flight is flight)
                if worker.is_alive:
                    worker.actor.cancel.remote(keys)
        return flight

    # ------------------------------------------------------------------ turns

    def _send_asked(self, turns: list[Turn]) -> None:
        """Send the turns that rollouters have asked for, those of a group in one request if they begin alike."""
        self._asked += turns
        if self._wave_seed is not None:
            # A wave is of all rollouts that are not finished: which turns it holds must not depend on the time.
            num_unfinished = sum(len(flight.sessions) - len(flight.finished) for flight in self.flights.values())
            if len(self._asked) < num_unfinished:
                return
        asked, self._asked = self._asked, []
        together: list[Turn] = []
        for turn in asked:
            if together and not (turn.flight is together[0].flight and turn.request == together[0].request):
                self._send(self._ask_of(together))
                together = []
            together.append(turn)
        if together:
            self._send(self._ask_of(together))

    def _ask_of(self, turns: list[Turn]) -> Ask:
        self._next_key += 1
        for turn in turns:
            turn.key = self._next_key
        return Ask(self._next_key, turns)

    def _send(self, ask: Ask) -> None:
        """Give a request to a worker whose version may sample it.

        The worker that sampled the rollout's last turn comes first, because it may still have the tokens in its cache.
        Otherwise it is the worker with the fewest requests.
        """
        flight, last = ask.flight, ask.turns[0].worker
        if flight.version is None:
            able = [worker for worker in self.workers if worker.is_alive and worker.policy_version >= flight.stamp]
        else:
            able = [worker for worker in self.workers if worker.is_kept and worker.policy_version == flight.version]
        if not able:
            if flight.version is None:
                self._unsent.append(ask)
            else:  # the worker that was kept for it is lost; the sender finds that out (side.py)
                self.cancel(flight.order)
            return
        worker = next((worker for worker in able if worker.name == last), None) if last else None
        worker = worker or min(able, key=lambda worker: len(worker.asks))
        ask.began_s = ask.began_s or time.time()
        flight.began_s = flight.began_s or ask.began_s
        for turn in ask.turns:
            turn.worker = worker.name
        worker.asks[ask.key] = ask
        worker.lane.send(ask)

    def _send_waiting(self) -> None:
        unsent, self._unsent = self._unsent, []
        for ask in unsent:
            self._send(ask)

    # ------------------------------------------------------------------ weights

    def update(self, manifest: Manifest, version: int) -> Coroutine[Any, Any, None]:
        """Have every worker load a version. A worker whose engine is being replaced loads it when the engine starts,
        and a worker that is kept at its version loads it when it is released.
        """
        assert self._calls is not None
        self._newest = (manifest, version)  # set before anything is awaited: a replaced engine then loads this version
        return self._update_all(self._calls(manifest, version))

    async def _update_all(self, calls: UpdateCalls) -> None:
        for together in calls:
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
        self._has_taken(worker)
        self._context.busy(worker.name, "update_weights", start=began, end=ended)
        self._send_waiting()

    async def settled(self) -> None:
        """Wait until no engine is loading weights. The trainer may then overwrite those before the newest."""
        while busy := [worker for worker in self.workers if worker.lock.locked()]:
            async with busy[0].lock:
                pass

    def newest(self) -> Worker | None:
        """The worker with the newest version among those that are not loading weights; None if there is none."""
        able = [worker for worker in self.workers if worker.is_alive and not worker.lock.locked()]
        return max(able, key=lambda worker: worker.policy_version, default=None)

    async def release(self, worker: Worker) -> None:
        """End the keeping of a worker, and have it load the newest weights."""
        worker.is_kept = False
        arguments = self._newest_for(worker)
        if arguments is not None:
            await self._update(worker, arguments)

    def _newest_for(self, worker: Worker) -> dict[str, Any] | None:
        """The arguments of the call by which a worker loads the newest weights; None if weights never change."""
        manifest, version = self._newest
        if self._calls is None or manifest is None:
            return None
        calls = [call for together in self._calls(manifest, version) for call in together]
        return dict(calls)[self.workers.index(worker)]

    def _has_taken(self, worker: Worker) -> None:
        if self._took is not None:
            self._took(worker.name, worker.policy_version)

    # ------------------------------------------------------------------ requests and pieces

    async def _serve(self, worker: Worker) -> None:
        """Serve one worker without end, and replace its engine whenever it is lost."""
        cause: BaseException | None = None if worker.is_alive else ActorLostError("its start was broken off")
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

    def _lane_to(self, worker: Worker) -> Lane[Ask, Collected]:
        return Lane(
            lambda asks: worker.actor.submit.remote([(ask.key, ask.rest()) for ask in asks]),
            lambda: worker.actor.collect.remote(COLLECT_S),
            lambda collected: self._take(worker, *collected),
            deadline_s=3 * self._deadline_s,
            name=lambda: f"{worker.name} (policy version {worker.policy_version})",
            batch_size=SUBMIT_REQUESTS if self._wave_seed is None else None,
        )

    def _take(self, worker: Worker, pieces: list[Piece], now: float) -> None:
        grown: dict[int, Flight] = {}
        for piece in pieces:
            ask = worker.asks.get(piece.key)
            if ask is None:  # cancelled
                continue
            turn = ask.waiting[piece.index]
            turn.take(piece, now)
            if piece.finish_reason:
                self._rollouters.can_go_on(turn.session)
            if piece.finish_reason and ask.is_finished:
                self._end(worker, ask, now)
                grown.pop(ask.flight.order, None)
            else:
                grown[ask.flight.order] = ask.flight
        if self._begun is not None:
            for flight in grown.values():
                self._begun(flight)

    def _end(self, worker: Worker, ask: Ask, now: float) -> None:
        del worker.asks[ask.key]
        worker.num_losses = 0
        worker.log.add(ask.began_s, now)

    async def _sample_waves(self, worker: Worker, wave_seed: Callable[[Flight], int]) -> None:
        """Sample waves. The seed of a wave depends only on its first group and turn, not on what happened before."""
        while True:
            asks = await worker.lane.next_batch()
            first = asks[0].turns[0]
            seed = (wave_seed(first.flight) + TURN_SEEDS * first.number) % 2**31
            wave = worker.actor.generate_wave.remote([ask.rest() for ask in asks], seed)
            replies, _, ended = await self._await_busy(worker, wave)
            for ask, completions in zip(asks, replies, strict=True):
                for turn, completion in zip(ask.waiting, completions, strict=True):
                    turn.finish(completion, ended)
                    self._rollouters.can_go_on(turn.session)
                self._end(worker, ask, ended)

    async def _await_busy(self, worker: Worker, call: Any) -> Any:
        """The result of a long call. Raises TimeoutError if the engine does not answer a heartbeat meanwhile."""
        name = f"{worker.name} (policy version {worker.policy_version})"
        return await await_with_heartbeat(call, worker.actor.pids.remote, 3 * self._deadline_s, name=name)

    # ------------------------------------------------------------------ a lost engine

    async def _replace(self, worker: Worker, cause: BaseException) -> None:
        """Replace a worker's engine. Its turns continue where they stand, on the first worker that may sample them."""
        worker.is_alive = worker.is_kept = False
        worker.num_losses += 1
        self.num_replaced += 1
        reason = reason_of(cause)
        if worker.num_losses >= MAX_CONSECUTIVE_LOSSES:
            raise StageError(
                f"{worker.name} was lost {MAX_CONSECUTIVE_LOSSES} times in a row; the last time: {reason}"
            ) from cause
        if self._replaced is not None:
            self._replaced(worker.name, reason)
        self._unsent += worker.asks.values()
        worker.asks, worker.lane = {}, self._lane_to(worker)
        self._send_waiting()
        index = self.workers.index(worker)
        worker.name, worker.actor = await self._engines.replace(index, cause)
        async with worker.lock:  # `settled` waits for the lock, so that the trainer does not overwrite these weights
            if (arguments := self._newest_for(worker)) is not None:
                await self._await_busy(worker, worker.actor.update_weights.remote(**arguments))
                worker.policy_version = arguments["policy_version"]
            worker.is_alive = True
        self._has_taken(worker)
        self._send_waiting()
