"""Whether an engine's core process is alive.

vLLM notices when the process has died. A frozen process is silent, but so is one that has nothing to do or is loading
weights. So silence counts only while the engine has work, and then a ping decides.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from posttrain.sampling.requests import EngineLostError

T = TypeVar("T")


def look_every_s(deadline_s: float) -> float:
    """Seconds between two checks; a silence is noticed at most this late."""
    return deadline_s / 16


class Watch:
    """Watches one engine core.

    deadline_s: seconds of silence after which the core is pinged, and seconds that it has to answer.
    is_dead: whether vLLM has noticed that the process is gone. is_busy: whether the engine has work.
    ping: a call that the core answers between two steps. say: adds the engine's name and policy version to a message.
    on_lost: called once, when the engine is found to be lost.
    """

    def __init__(
        self,
        deadline_s: float,
        is_dead: Callable[[], bool],
        is_busy: Callable[[], bool],
        *,
        ping: Callable[[], Awaitable[object]],
        say: Callable[[str], str],
        on_lost: Callable[[], None],
    ):
        self.deadline_s = deadline_s
        self.error: EngineLostError | None = None
        self._is_dead = is_dead
        self._is_busy = is_busy
        self._ping = ping
        self._say = say
        self._on_lost = on_lost
        self._heard = time.monotonic()
        self._lost = asyncio.Event()

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard = time.monotonic()

    def lose(self, message: str) -> EngineLostError:
        """Mark the engine as lost and return the error. If it was lost before, the first message is kept."""
        if self.error is None:
            self.error = EngineLostError(self._say(message))
            self._lost.set()
            self._on_lost()
        return self.error

    def check(self) -> None:
        """Raise EngineLostError if the engine is lost."""
        if self.error is None and self._is_dead():
            self.lose("its core process has died")
        if self.error is not None:
            raise EngineLostError(str(self.error))

    async def run(self) -> None:
        """Check from time to time, until the engine is lost."""
        while self.error is None:
            await asyncio.sleep(look_every_s(self.deadline_s))
            if self._is_dead():
                self.lose("its core process has died")
            elif not self._is_busy():
                self.heard()
            elif time.monotonic() - self._heard > self.deadline_s:
                await self._ask()

    async def _ask(self) -> None:
        silent_s = time.monotonic() - self._heard
        try:
            async with asyncio.timeout(self.deadline_s):
                await self._ping()
        except Exception as error:
            if not self._is_busy() or time.monotonic() - self._heard < self.deadline_s:
                return  # output arrived, or the work was cancelled, during the ping
            detail = "" if isinstance(error, TimeoutError) else f" ({error})"
            self.lose(f"no token for {silent_s:.0f} s, and no answer to a ping in {self.deadline_s:g} s{detail}")
        else:
            self.heard()

    async def guard(self, awaitable: Awaitable[T]) -> T:
        """The result of `awaitable`, or EngineLostError as soon as the engine is lost."""
        self.check()
        task = asyncio.ensure_future(awaitable)
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.check()
            return task.result()
        finally:
            lost.cancel()
            task.cancel()
