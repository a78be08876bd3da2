"""Work to one actor and its results back, each in batches: a call between processes costs more than most work does.

    send ──► outbox ──► submit ──► actor ──► collect ──► take
                 next_batch: what waits          one call after another: it brings results, and is the heartbeat

What waits for what: one call brings work and one fetches results, both for any number of pieces of work; nothing waits
for a whole piece. Work that comes while a call is on its way goes with the next. `collect` waits on the actor for
COLLECT_S at most, so an actor that is frozen is noticed though it has nothing to do.

Left out: what becomes of an actor that was lost and of the work it had, which differs (rollout workers go on with
half a reply, rewards are scored again); `serve` raises, and the owner makes a lane to another actor.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

from posttrain.actors.calls import await_call
from posttrain.actors.losses import is_loss

Work = TypeVar("Work")
Results = TypeVar("Results")
COLLECT_S = 1.0


class Lane(Generic[Work, Results]):
    """Both directions between this process and one actor.

    submit: makes the call that hands a batch of at most `batch_size` to the actor. collect: makes the call that
    returns what is done since the last one, waiting up to COLLECT_S for the first result. take: is given that.
    deadline_s: an actor that is later with an answer is lost. name: says who was lost, in a TimeoutError.
    refused: is given a batch that could not be submitted for an error that says nothing about the actor; None: such an
    error ends the lane. Example: see `scoring/remote/life.py`.
    """

    def __init__(
        self,
        submit: Callable[[list[Work]], Awaitable[object]],
        collect: Callable[[], Awaitable[Results]],
        take: Callable[[Results], None],
        *,
        deadline_s: float,
        name: Callable[[], str],
        batch_size: int | None = None,
        refused: Callable[[list[Work], Exception], None] | None = None,
    ):
        self._submit = submit
        self._collect = collect
        self._take = take
        self._deadline_s = deadline_s
        self._name = name
        self._batch_size = batch_size
        self._refused = refused
        self._outbox: list[Work] = []
        self._wake = asyncio.Event()
        self._error: BaseException | None = None
        self._calls: dict[str, Awaitable[object]] = {}  # the last call of `submit`, and of `collect`

    def send(self, work: Work) -> None:
        """Queue work for the actor."""
        self._outbox.append(work)
        self._wake.set()

    def withdraw(self, is_unwanted: Callable[[Work], bool]) -> None:
        """Drop queued work that has not been sent yet."""
        self._outbox = [work for work in self._outbox if not is_unwanted(work)]

    def fail(self, error: BaseException) -> None:
        """Make `serve` raise this error, because another call has found that the actor is lost."""
        self._error = error
        self._wake.set()

    async def serve(self) -> None:
        """Send work to the actor and take its results until cancelled. Raises the error by which the actor was lost."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._feed())
                group.create_task(self._empty())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def leave(self, forget: Callable[[], Awaitable[object]]) -> None:
        """Leave nothing of this lane's in an actor that goes on for another caller. `serve` was cancelled before.

        forget: makes the call by which the actor drops its work and lets a waiting `collect` return. Ray may begin the
        calls of an asynchronous actor in another order than they were made in. So the last batch must have arrived
        before `forget` is called; and the last `collect` is waited for, because one that begins after `forget` would
        take the next caller's results. Raises what `forget` raises, and TimeoutError if all of this takes more than
        `deadline_s`.
        """
        async with asyncio.timeout(self._deadline_s):
            await self._ended("submit")
            await forget()
            await self._ended("collect")

    async def _ended(self, kind: str) -> None:
        if (call := self._calls.get(kind)) is not None:
            with suppress(Exception):  # how the call ended is of no interest any more
                await call

    async def next_batch(self) -> list[Work]:
        """Wait for work and return the next batch. Raises the error given to `fail`."""
        while True:
            if self._error is not None:
                raise self._error
            if self._outbox:
                size = self._batch_size or len(self._outbox)
                batch, self._outbox = self._outbox[:size], self._outbox[size:]
                return batch
            self._wake.clear()
            await self._wake.wait()

    async def _feed(self) -> None:
        while True:
            batch = await self.next_batch()
            call = self._calls["submit"] = self._submit(batch)
            try:
                await await_call(call, self._deadline_s, f"{self._name()} did not take work")
            except Exception as error:
                if self._refused is None or is_loss(error):
                    raise
                self._refused(batch, error)

    async def _empty(self) -> None:
        while True:
            call = self._calls["collect"] = self._collect()
            self._take(await await_call(call, COLLECT_S + self._deadline_s, f"{self._name()} did not answer"))
