"""Runs the rollouters of all groups in progress.

    start ──► rollouter, until it waits ── for turns ──► asked ──► the workers sample them ──► can_go_on
                 ▲      │              └── for other work: a task ──────────────────────────► can_go_on
                 │      └── ends; the last of its group ──► finished                              │
                 └────────────────────────────────────────────────────────────────────────────────┘

A rollouter has no task of its own. A callback of the event loop runs all that can go on, each until it waits again, and
then passes on the turns that they asked for in this round. So the turns of a group come together.
"""

import asyncio
from collections.abc import Callable

from posttrain.errors import StageError
from posttrain.sampling.rollouter import Flight, Rollouter, Session
from posttrain.sampling.rollouts import UNBEGUN
from posttrain.sampling.turns import Outside, Turn


class RunningRollouters:
    """Runs `rollouter` for each rollout of the groups that are started.

    asked: called after each round with the turns that the rollouters asked for in it. finished: called with each group
    whose rollouts are all finished.
    """

    def __init__(
        self, rollouter: Rollouter, *, asked: Callable[[list[Turn]], None], finished: Callable[[Flight], None]
    ):
        self._rollouter = rollouter
        self._asked = asked
        self._finished = finished
        self._turns: list[Turn] = []  # asked for in this round
        self._ready: list[Session] = []  # whose rollouters can go on
        self._is_scheduled = False
        self._error: BaseException | None = None
        self._has_failed = asyncio.Event()
        self.flights: dict[int, Flight] = {}  # the groups in progress, by order

    def start(self, flight: Flight) -> None:
        """Begin to make the rollouts of a group."""
        self.flights[flight.order] = flight
        recorded = flight.recorded or (UNBEGUN,) * flight.request.n
        flight.sessions = [Session(flight, index, reply) for index, reply in enumerate(recorded)]
        for session in flight.sessions:
            session.running = (flight.rollouter or self._rollouter).run(flight.prompt.prompt, session)
        self._ready += flight.sessions
        self._schedule()

    def can_go_on(self, session: Session) -> None:
        """Note that what a rollouter waits for is done."""
        self._ready.append(session)
        self._schedule()

    def forget(self, order: int) -> Flight | None:
        """Stop the rollouters of a group. Returns the group, or None if it is not in progress."""
        flight = self.flights.pop(order, None)
        self._turns = [turn for turn in self._turns if turn.flight is not flight]
        for session in flight.sessions if flight is not None else ():
            if session.running is not None:
                session.running.close()
            if session.waits_for is not None and session.waits_for.task is not None:
                session.waits_for.task.cancel()
        return flight

    async def raise_failure(self) -> None:
        """Wait until a rollouter fails, and raise its error."""
        await self._has_failed.wait()
        assert self._error is not None
        raise self._error

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Run every rollouter that can go on. As a callback of the event loop it is part of no task, so that a
        rollouter never runs within a task that is not its own.
        """
        self._is_scheduled = False
        ready, self._ready = self._ready, []
        try:
            for session in ready:
                if self.flights.get(session.flight.order) is session.flight:  # otherwise it was forgotten
                    self._run(session)
            turns, self._turns = self._turns, []
            self._asked(turns)
        except Exception as error:
            self._error = self._error or error
            self._has_failed.set()

    def _run(self, session: Session) -> None:
        """Run a rollouter until it waits for its session, or has ended."""
        assert session.running is not None
        flight, session.waits_for = session.flight, None
        try:
            waits_for: object = session.running.send(None)
        except StopIteration as end:
            flight.finished[session.index] = end.value
            session.running = None
            if flight.is_finished:
                del self.flights[flight.order]
                # A flight and its sessions refer to each other, and garbage is collected rarely (actors/garbage.py).
                flight.sessions.clear()
                self._finished(flight)
            return
        if isinstance(waits_for, Turn):
            self._turns.append(waits_for)
        elif isinstance(waits_for, Outside):
            session.waits_for = waits_for
            waits_for.task = asyncio.ensure_future(waits_for.work)
            waits_for.task.add_done_callback(lambda _: self.can_go_on(session))
        else:
            raise StageError(
                f"{session.name}: the rollouter awaited {waits_for!r}; it may await its session, and everything else "
                "by session.outside"
            )
