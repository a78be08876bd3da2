"""The program of a reward process. It reads requests from stdin, and writes one reply to each on stdout.

    pool ── Setup ─────► imports the function ── Loaded ─► pool
    pool ── Question ──► calls it             ── Answer ─► pool

If a plain function is late, the pool kills this process. An async function handles many requests at once, so this
process cancels a late request by itself. It imports neither torch nor pydantic, so that it starts in about 0.1 s.
Run as `python -m posttrain.scoring.pool.reward_process PARENT_PID`.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable
from typing import Any, BinaryIO

import msgspec

from posttrain.records import RewardResult
from posttrain.scoring.plugins.results import to_result
from posttrain.scoring.plugins.target import RewardFunction, Target, bind, import_target, warm
from posttrain.scoring.pool.pipes import begin_process, open_pipe, read, read_blocking, reason, reply
from posttrain.scoring.pool.wire import Answer, Question, Setup

_questions = msgspec.msgpack.Decoder(Question)


def main() -> None:
    begun = begin_process(Setup, _prepare)
    if begun is None:
        return
    setup, function, requests, replies = begun
    if inspect.iscoroutinefunction(function):
        asyncio.run(_serve_many(function, requests, replies, timeout_s=setup.timeout_s))
    else:
        _serve(function, requests, replies)


def _serve(function: RewardFunction, requests: BinaryIO, replies: int) -> None:
    while (data := read_blocking(requests)) is not None:
        question = _questions.decode(data)
        started_s = time.monotonic()
        result, error = _score(function, question)
        reply(replies, Answer(question.key, time.monotonic() - started_s, result, error))


def _score(function: RewardFunction, question: Question) -> tuple[RewardResult | None, str]:
    """The result, or why there is none."""
    try:
        value = function(question.rollout, question.row)
        if not isinstance(value, float) and inspect.isawaitable(value):
            value = asyncio.run(_await(value))
        return to_result(value), ""
    except BaseException as error:  # sys.exit() in a reward is a failure of this one score
        return None, reason(error)


async def _serve_many(function: RewardFunction, requests: BinaryIO, replies: int, *, timeout_s: float) -> None:
    reader = await open_pipe(requests)
    running: set[asyncio.Task[None]] = set()
    while (data := await read(reader)) is not None:
        task = asyncio.create_task(_score_async(function, _questions.decode(data), replies, timeout_s=timeout_s))
        running.add(task)
        task.add_done_callback(running.discard)


async def _score_async(function: RewardFunction, question: Question, replies: int, *, timeout_s: float) -> None:
    started_s = time.monotonic()
    result, why, is_late = None, "", False
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            value = function(question.rollout, question.row)
            result = to_result(await value if inspect.isawaitable(value) else value)
    except BaseException as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            is_late = True
        else:
            why = reason(error)
    reply(replies, Answer(question.key, time.monotonic() - started_s, result, why, is_late))


def _prepare(setup: Setup) -> tuple[RewardFunction, bool]:
    """Import the function and call its module's `warm_up()` if there is one. Returns whether the function is async."""
    module, function = import_target(Target(**setup.target))
    warm(module, setup.args)
    return bind(function, setup.args), inspect.iscoroutinefunction(function)


async def _await(value: Awaitable[object]) -> Any:
    return await value


if __name__ == "__main__":
    main()
