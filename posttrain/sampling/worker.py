"""One rollout worker: the place of an engine, the requests that the engine has, and the lane to it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec.structs import replace

from posttrain.actors.calls import await_with_heartbeat
from posttrain.actors.lane import COLLECT_S, Lane
from posttrain.context import BusyLog
from posttrain.sampling.packed import Requests
from posttrain.sampling.requests import Piece, SampleRequest
from posttrain.sampling.roads import EnginePlace
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.turns import Turn

T = TypeVar("T")
Collected = tuple[list[Piece], float]  # of `EngineActor.collect`: pieces, and the Unix time


@dataclass(slots=True, eq=False)
class Ask:
    """What one request to an engine is for: turns of one group that begin with the same tokens.

    key: the key under which the engine gets it. waiting: the turns that the latest request to an engine asks for, in
    the order of its replies. num_left: how many of these are not sampled yet. began_s: Unix time at which it was first
    sent.
    """

    key: int
    turns: list[Turn]
    waiting: list[Turn] = field(default_factory=list)
    num_left: int = 0
    began_s: float = 0.0

    @property
    def flight(self) -> Flight:
        """The group of the turns."""
        return self.turns[0].flight

    def rest(self) -> SampleRequest:
        """The request for the turns, or parts of turns, that are not sampled yet."""
        self.waiting = [turn for turn in self.turns if not turn.completion.finish_reason]
        self.num_left = len(self.waiting)
        request = self.turns[0].request
        if any(turn.completion.token_ids for turn in self.waiting):
            return replace(request, begun=tuple(turn.completion.token_ids for turn in self.waiting))
        return request if request.n == len(self.waiting) else replace(request, n=len(self.waiting))


class Worker:
    """One place for an engine. If the engine is lost, another takes its place and the worker stays.

    name, actor: those of the engine. policy_version: the version that the engine samples with. take: called with the
    worker and with what it has collected. log: when it was busy. batch_size: the largest number of requests that are
    sent at once; None means all. place: where the engine runs; None if that is not known. seat: that of its engines
    among those of the stage.

    is_alive: whether it has an engine that works. is_leaving: whether it only finishes what it has. asks: the requests
    that the engine has, by key. is_kept: whether it keeps its version for now. lock: held while the engine loads
    weights. num_losses: engines lost in a row, without a finished request in between.
    """

    def __init__(
        self,
        name: str,
        actor: Any,
        policy_version: int,
        *,
        take: "Callable[[Worker, list[Piece], float], None]",
        log: BusyLog,
        deadline_s: float,
        batch_size: int | None,
        is_alive: bool,
        place: EnginePlace | None = None,
        seat: int = 0,
    ):
        self.name = name
        self.seat = seat
        self.place = place
        self.actor = actor
        self.policy_version = policy_version
        self.log = log
        self.is_alive = is_alive
        self.is_kept = self.is_leaving = False
        self.asks: dict[int, Ask] = {}
        self.lock = asyncio.Lock()
        self.num_losses = 0
        self._take = take
        self._silence_s = 3 * deadline_s
        self._batch_size = batch_size
        self.lane = self._new_lane()

    def _new_lane(self) -> Lane[Ask, Collected]:
        return Lane(
            lambda asks: self.actor.submit.remote(Requests((ask.key, ask.rest()) for ask in asks)),
            lambda: self.actor.collect.remote(COLLECT_S),
            lambda collected: self._take(self, *collected),
            deadline_s=self._silence_s,
            name=self._named,
            batch_size=self._batch_size,
        )

    def _named(self) -> str:
        return f"{self.name} (policy version {self.policy_version})"

    @property
    def num_unfinished(self) -> int:
        """How many turns the engine has to sample."""
        return sum(ask.num_left for ask in self.asks.values())

    def send(self, ask: Ask) -> None:
        """Give the engine a request."""
        for turn in ask.turns:
            turn.worker = self.name
            if turn.session.since is None:
                turn.session.since = self.policy_version
        self.asks[ask.key] = ask
        self.lane.send(ask)

    def end(self, ask: Ask, now: float) -> None:
        """Note that a request is finished."""
        del self.asks[ask.key]
        self.num_losses = 0
        self.log.add(ask.began_s, now)

    def cancel(self, flight: Flight) -> None:
        """Withdraw the requests of a group."""
        keys = [key for key in flight.keys if self.asks.pop(key, None) is not None]
        if keys:
            self.lane.withdraw(lambda ask: ask.flight is flight)
            if self.is_alive:
                self.actor.cancel.remote(keys)

    def lose(self) -> list[Ask]:
        """Note that the engine is lost. Returns its requests, which are to be sent to another one."""
        self.is_alive = self.is_kept = False
        self.num_losses += 1
        asks, self.asks = list(self.asks.values()), {}
        self.lane = self._new_lane()
        return asks

    async def leave(self) -> None:
        """Remove our requests from the engine, which may serve another caller next."""
        if self.is_alive:
            await self.lane.leave(self.actor.forget.remote)

    async def await_busy(self, call: Awaitable[T]) -> T:
        """The result of a long call. Raises TimeoutError if the engine does not answer a heartbeat meanwhile, and the
        error by which the lane to it has failed.
        """
        return await self.lane.guarded(
            await_with_heartbeat(call, self.actor.pids.remote, self._silence_s, name=self._named())
        )
