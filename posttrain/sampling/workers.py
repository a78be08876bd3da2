"""The rollout workers: engines that are fed and emptied in batches, take new weights, and are replaced when lost.

    send ──► rollouters ──► turns ──► lane ──► engine ──► lane ──► pieces ──► turns ──► rollouters ──► finished group
              one for each             ▲          │ SIGKILL, SIGSTOP, a deadline passed: another engine takes the
              rollout                  └──────────┘ newest weights, and the turns go on where they stood, there or on
                                                    another worker

What waits for what: a rollouter waits for its turn (running.py). Each worker (worker.py) has a lane to its engine
(actors/lane.py), which sends requests and fetches pieces in batches. Nothing waits for a whole group. Each wait on an
engine has a deadline. How workers take newer weights is in worker_weights.py.

The turns that a group's rollouters ask for in one round, and that begin with the same tokens, are
one request: at the first turn the whole group, whose prompt the engine then prepares once.

Workers may join and leave while the others go on (joining.py).
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from posttrain.actors.losses import MAX_CONSECUTIVE_LOSSES, ActorLostError, is_loss, reason_of, root_of
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.hosts.directory import directory
from posttrain.sampling.client import Engines
from posttrain.sampling.loads import WorkerLoads
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.requests import Piece
from posttrain.sampling.rollouter import Flight, Rollouter, SingleTurn
from posttrain.sampling.running import RunningRollouters
from posttrain.sampling.turns import Turn
from posttrain.sampling.worker import Ask, Worker
from posttrain.sampling.worker_weights import CallsOf, WorkerWeights

SUBMIT_REQUESTS = 256
# Apart, so that no later turn, and no later rollout of a group, has the seed of another group's first one.
TURN_SEEDS, INDEX_SEEDS = 998_244_353, 754_974_721


class RolloutWorkers:
    """Makes groups of rollouts with `rollouter` on the engines, which have the weights of policy version `version`.

    finished: called with each group whose rollouts are all finished. begun: called with each group that has new tokens.
    calls: gives the calls by which engines load a version. manifest: the weights of `version`. Both are None if the
    weights never change; an engine that replaces a lost one then has the weights of the model folder. took: called with
    the name of a worker and the version that it has loaded. replaced: called with the name of a worker and why its
    engine was lost. given_up: called with a worker whose engine cannot be replaced, and why; it serves no more. None:
    the run fails, as it does if no other worker is left. wave_seed: if given, turns are sampled in deterministic waves.
    A wave holds all turns that are waited for, and the next one starts when it is finished. Its seed follows from
    wave_seed(first group of the wave), and from the place of its first turn in that group.
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
        calls: CallsOf | None = None,
        manifest: Manifest | None = None,
        version: int = 0,
        took: Callable[[str, int], None] | None = None,
        replaced: Callable[[str, str], None] | None = None,
        given_up: Callable[[Worker, str], None] | None = None,
        wave_seed: Callable[[Flight], int] | None = None,
    ):
        self._engines = engines
        self._rollouters = RunningRollouters(rollouter or SingleTurn(), asked=self._send_asked, finished=finished)
        self._begun = begun
        self._took = took
        self._replaced = replaced
        self._given_up = given_up
        self._deadline_s = deadline_s
        self._group: asyncio.TaskGroup | None = None  # while it serves
        self._serving: dict[Worker, asyncio.Task[None]] = {}
        self._wave_seed = wave_seed
        # No other caller of a warm engine has the same keys. One that was killed may have left requests in it.
        self._next_key = secrets.randbits(48)
        self._asked: list[Turn] = []  # turns that rollouters have asked for and that are not sent yet
        self._unsent: list[Ask] = []  # requests that no worker may sample now
        self.num_replaced = 0
        # How many tokens turns after the first have read, and how many of them the engines had in their caches.
        # Deterministic waves begin with empty caches, and are left out.
        self.num_read = self.num_cached = 0
        self.workers = [self.make(seat, version, is_alive=engines.is_ready(seat)) for seat in engines.seats]
        self.loads = WorkerLoads(context, self.workers)
        self.weights = WorkerWeights(
            context, self.workers, calls=calls, manifest=manifest, version=version, taken=self._has_taken
        )

    @property
    def counted(self) -> list[Worker]:
        """The workers that sample, or whose engines are being replaced: none that is about to join or to leave."""
        return [worker for worker in self.workers if worker in self._serving and not worker.is_leaving]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that could sample for a group which is sent now."""
        alive = [worker.policy_version for worker in self.workers if worker.is_alive and not worker.is_leaving]
        return min(alive or [worker.policy_version for worker in self.workers])

    async def run(self) -> None:
        """Serve until cancelled. Raises an error that replacing an engine does not mend."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._rollouters.raise_failure())
                if (hosts := directory()) is not None:
                    group.create_task(self._watch(hosts))
                group.create_task(self.loads.run())
                self._group = group
                for worker in self.workers:
                    self.serve(worker)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for order in list(self.flights):
                self._rollouters.forget(order)
            for worker in self.workers:
                worker.log.flush()
            await asyncio.gather(*(worker.leave() for worker in self.workers), return_exceptions=True)

    async def _watch(self, hosts: Any) -> None:
        """Treat the engines on a host that does not answer as lost, long before Ray does."""
        suspected: frozenset[str] = frozenset()
        while True:
            suspected = await hosts.suspected.remote(suspected)
            for worker in self.workers:
                if worker.place is not None and worker.place.node in suspected:
                    worker.lane.fail(ActorLostError(f"the host of {worker.name} does not answer"))

    def make(self, seat: int, version: int, *, is_alive: bool) -> Worker:
        """A worker with the engine of a seat, which is not one of `workers` yet."""
        engines = self._engines
        return Worker(
            engines.names[seat],
            engines.actors[seat],
            version,
            take=self._take,
            log=list(engines.logs.values())[seat],
            deadline_s=self._deadline_s,
            batch_size=SUBMIT_REQUESTS if self._wave_seed is None else None,
            is_alive=is_alive,
            place=engines.places[seat],
            seat=seat,
        )

    def serve(self, worker: Worker) -> None:
        """Serve one of `workers`, while `run` runs."""
        assert self._group is not None
        self._serving[worker] = self._group.create_task(self._serve(worker))

    def take_out(self, worker: Worker) -> int:
        """Remove a worker. Others go on with its requests, whose number is returned."""
        self._serving.pop(worker).cancel()
        asks = worker.lose()
        self.workers.remove(worker)
        worker.log.flush()
        self._unsent += asks
        self._send_waiting()
        return len(asks)

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
            worker.cancel(flight)
        return flight

    # ------------------------------------------------------------------ turns

    def _send_asked(self, turns: list[Turn]) -> None:
        """Send the turns that rollouters have asked for, those of a group in one request if they begin alike."""
        self._asked += turns
        if self._wave_seed is not None:
            # A wave is of all rollouts that have begun: which turns it holds must not depend on the time.
            begun = (
                one.running is not None and not one.is_waiting
                for group in self.flights.values()
                for one in group.sessions
            )
            if len(self._asked) < sum(begun):
                return
            # Nor must their order: an environment may answer one rollout before another.
            self._asked.sort(key=lambda turn: (turn.flight.order, turn.session.index))
        asked, self._asked = self._asked, []
        together: list[Turn] = []
        for turn in asked:
            if together and not _are_one_request(turn, together[0]):
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
            able = [
                worker
                for worker in self.workers
                if worker.is_alive and not worker.is_leaving and worker.policy_version >= flight.stamp
            ]
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
        worker.send(ask)

    def _send_waiting(self) -> None:
        unsent, self._unsent = self._unsent, []
        for ask in unsent:
            self._send(ask)

    def _has_taken(self, worker: Worker) -> None:
        if self._took is not None:
            self._took(worker.name, worker.policy_version)
        self._send_waiting()

    # ------------------------------------------------------------------ requests and pieces

    async def _serve(self, worker: Worker) -> None:
        """Serve one worker without end, and replace its engine whenever it is lost."""
        cause: BaseException | None = None if worker.is_alive else ActorLostError("its start was broken off")
        while True:
            try:
                if cause is not None and not await self._replace(worker, cause):
                    return
                if self._wave_seed is not None:
                    await self._sample_waves(worker, self._wave_seed)
                await worker.lane.serve()
            except Exception as error:  # a replacement may be lost too, before it serves
                cause = root_of(error)
                if not is_loss(cause):
                    if isinstance(cause, StageError) and not worker.is_alive and self._may_shrink(worker):
                        self._give_up(worker, reason_of(cause))
                        return
                    raise cause from None

    def _take(self, worker: Worker, pieces: list[Piece], now: float) -> None:
        grown: dict[int, Flight] = {}
        self.loads.sampled(worker, sum(len(piece.token_ids) for piece in pieces))
        for piece in pieces:
            ask = worker.asks.get(piece.key)
            if ask is None:  # cancelled
                continue
            turn = ask.waiting[piece.index]
            turn.take(piece, now)
            if piece.finish_reason:
                self._note_cached(turn, piece.num_cached)
                self._rollouters.can_go_on(turn.session)
                ask.num_left -= 1
            if not ask.num_left:
                worker.end(ask, now)
                grown.pop(ask.flight.order, None)
            else:
                grown[ask.flight.order] = ask.flight
        if self._begun is not None:
            for flight in grown.values():
                self._begun(flight)

    def _note_cached(self, turn: Turn, num_cached: int) -> None:
        if turn.number:
            self.num_read += (num_read := len(turn.request.prompt_ids))
            # A turn that went on in another engine has read its own tokens too.
            self.num_cached += min(num_cached, num_read)

    async def _sample_waves(self, worker: Worker, wave_seed: Callable[[Flight], int]) -> None:
        """Sample waves. The seed of a wave depends only on its first turn, not on what happened before."""
        while True:
            asks = await worker.lane.next_batch()
            first = asks[0].turns[0]
            seed = (wave_seed(first.flight) + TURN_SEEDS * first.number + INDEX_SEEDS * first.session.index) % 2**31
            wave = worker.actor.generate_wave.remote([ask.rest() for ask in asks], seed)
            replies, _, ended = await worker.await_busy(wave)
            for ask, completions in zip(asks, replies, strict=True):
                for turn, completion in zip(ask.waiting, completions, strict=True):
                    turn.finish(completion, ended)
                    self._rollouters.can_go_on(turn.session)
                worker.end(ask, ended)

    # ------------------------------------------------------------------ a lost engine

    async def _replace(self, worker: Worker, cause: BaseException) -> bool:
        """Replace a worker's engine. Its turns continue where they stand, on the first worker that may sample them.

        Returns False if there will be no other engine.
        """
        self._unsent += worker.lose()
        if worker.is_leaving:
            self._send_waiting()
            return False
        self.num_replaced += 1
        reason = reason_of(cause)
        if worker.num_losses >= MAX_CONSECUTIVE_LOSSES and self._may_shrink(worker):
            self._give_up(worker, reason)
            return False
        if worker.num_losses >= MAX_CONSECUTIVE_LOSSES:
            raise StageError(
                f"{worker.name} was lost {MAX_CONSECUTIVE_LOSSES} times in a row; the last time: {reason}"
            ) from cause
        if self._replaced is not None:
            self._replaced(worker.name, reason)
        self._send_waiting()
        worker.place = None
        worker.name, worker.actor = await self._engines.replace(worker.seat, cause)
        worker.place = self._engines.places[worker.seat]
        await self.weights.begin(worker)
        return True

    def _may_shrink(self, worker: Worker) -> bool:
        """Whether the run may go on without a worker."""
        others = (other for other in self.workers if other is not worker)
        return self._given_up is not None and any(other.is_alive and not other.is_leaving for other in others)

    def _give_up(self, worker: Worker, reason: str) -> None:
        worker.is_leaving = True
        self._send_waiting()
        assert self._given_up is not None
        self._given_up(worker, reason)


def _are_one_request(one: Turn, other: Turn) -> bool:
    """Whether two turns can be replies to one request: not if they have a seed, by which both would be the same."""
    return one.flight is other.flight and one.request == other.request and one.request.seed is None
