"""Sends work to one actor and fetches its results, both in batches, because a call between processes takes longer than
most pieces of work.

    send ──► outbox ──► submit ──► actor ──► collect ──► take
                 next_batch: what waits          one call after another, which fetches results and is the heartbeat

What waits for what: there is always at most one call that brings work and one that fetches results. Each carries any
number of pieces of work, and none waits until a piece is done. Work that comes while a call is in progress goes with
the next call. `collect` waits at most COLLECT_S on the actor, so a frozen actor is noticed even if it has no work.

Left out: what happens to a lost actor and its work, because that differs: rollout workers continue half a reply, and
rewards are scored again. `serve` raises, and the owner makes a lane to another actor.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

from posttrain.actors.calls import await_call
from posttrain.actors.losses import is_loss

Work = TypeVar("Work")
Results = TypeVar("Results")
Answer = TypeVar("Answer")
COLLECT_S = 1.0


class Lane(Generic[Work, Results]):
    """Both directions between this process and one actor.

    submit: makes the call that sends a batch of at most `batch_size` to the actor. collect: makes the call that
    returns the results since the last call, and waits up to COLLECT_S for the first. take: is called with them.
    deadline_s: an actor that takes longer for an answer counts as lost. name: names the actor in a TimeoutError.
    refused: is called with a batch that the actor refused by an error which does not mean that the actor is lost; if
    it is None, such an error ends the lane. Example: see `scoring/remote/life.py`.
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
        self._failed = asyncio.Event()
        self._calls: dict[str, Awaitable[object]] = {}  # the last call of `submit`, and of `collect`

    def send(self, work: Work) -> None:
        """Queue work for the actor."""
        self._outbox.append(work)
        self._wake.set()

    def withdraw(self, is_unwanted: Callable[[Work], bool]) -> None:
        """Drop queued work that has not been sent yet."""
        self._outbox = [work for work in self._outbox if not is_unwanted(work)]

    def fail(self, error: BaseException) -> None:
        """Make `serve` and `guarded` raise this error at once: something else has shown that the actor is lost."""
        self._error = error
        self._failed.set()
        self._wake.set()

    async def serve(self) -> None:
        """Send work to the actor and take its results until cancelled. Raises the error by which the actor was lost."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._feed())
                group.create_task(self._empty())
                group.create_task(self._break())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def guarded(self, call: Awaitable[Answer]) -> Answer:
        """The result of another call of the actor. Raises the error given to `fail` as soon as it is given."""
        calling, failed = asyncio.ensure_future(call), asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait({calling, failed}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done() and self._error is not None:
                raise self._error
            return calling.result()
        finally:
            failed.cancel()
            calling.cancel()

    async def leave(self, forget: Callable[[], Awaitable[object]]) -> None:
        """Remove this lane's work from an actor that another caller will use next. Cancel `serve` before.

        forget: makes the call by which the actor drops its work and lets a waiting `collect` return. Ray may begin the
        calls of an asynchronous actor in another order than they were made in. So this waits until the last batch has
        arrived before it calls `forget`. It also waits for the last `collect`, because a `collect` that begins after
        `forget` would take the next caller's results. Raises what `forget` raises, and TimeoutError if all of this
        takes more than `deadline_s`.
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

    async def _break(self) -> None:
        await self._failed.wait()
        assert self._error is not None
        raise self._error

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
