"""Await a remote call, with a deadline or with a heartbeat.

Neither uses a timeout around the call. If this process itself was stopped for a while, the answer may have arrived by
the time the deadline is checked, and then it counts.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
HEARTBEAT_S = 1.0


async def await_call(call: Awaitable[T], timeout_s: float, message: str) -> T:
    """The result of a remote call. Raises TimeoutError, which says `message` and the time, if it takes too long."""
    waiting = asyncio.ensure_future(call)
    try:
        if not (await asyncio.wait({waiting}, timeout=timeout_s))[0]:
            raise TimeoutError(f"{message} within {timeout_s:g} s")
        return waiting.result()
    finally:
        waiting.cancel()


async def await_with_heartbeat(
    call: Awaitable[T], ping: Callable[[], Awaitable[object]], timeout_s: float, *, name: str
) -> T:
    """The result of a long call of an actor that answers other calls in the meantime.

    ping: makes a short call that the actor answers at once; one is made each second. Raises TimeoutError, which says
    that `name` did not answer, when a ping takes more than `timeout_s` seconds.
    """
    waiting = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({waiting}, timeout=HEARTBEAT_S))[0]:
            await await_call(ping(), timeout_s, f"{name} did not answer")
        return waiting.result()
    finally:
        waiting.cancel()
