"""The program of a reward process. It reads requests from stdin, and writes one reply to each on stdout.

    pool ── Setup ─────► imports the function ── Loaded ─► pool
    pool ── Question ──► calls it             ── Answer ─► pool

If a plain function is late, the pool kills this process. An async function handles many requests at once, so this
process cancels a late request by itself. It imports neither torch nor pydantic, so that it starts in about 0.1 s.
Run as `python -m posttrain.scoring.pool.reward_process PARENT_PID`.
"""

import asyncio
import inspect
import os
import resource
import sys
import time
from collections.abc import Awaitable
from typing import Any, BinaryIO

import msgspec

from posttrain.actors.parent import die_with_parent
from posttrain.errors import PosttrainError
from posttrain.records import RewardResult
from posttrain.scoring.plugins.results import MAX_REASON, to_result
from posttrain.scoring.plugins.target import RewardFunction, Target, bind, describe, import_target, warm
from posttrain.scoring.pool.wire import HEADER_BYTES, Answer, Loaded, Question, Setup, frame

_questions = msgspec.msgpack.Decoder(Question)


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    requests, replies = _take_pipes()
    data = _read_blocking(requests)
    if data is None:
        return
    setup = msgspec.msgpack.decode(data, type=Setup)
    try:
        function, is_async = _prepare(setup)
    except BaseException as error:
        _reply(replies, Loaded(failed=_reason(error)))
        return
    _reply(replies, Loaded(is_async=is_async))
    if is_async:
        asyncio.run(_serve_many(function, requests, replies, timeout_s=setup.timeout_s))
    else:
        _serve(function, requests, replies)


def _serve(function: RewardFunction, requests: BinaryIO, replies: int) -> None:
    while (data := _read_blocking(requests)) is not None:
        question = _questions.decode(data)
        started_s = time.monotonic()
        result, error = _score(function, question)
        _reply(replies, Answer(question.key, time.monotonic() - started_s, result, error))


def _score(function: RewardFunction, question: Question) -> tuple[RewardResult | None, str]:
    """The result, or why there is none."""
    try:
        value = function(question.rollout, question.row)
        if not isinstance(value, float) and inspect.isawaitable(value):
            value = asyncio.run(_await(value))
        return to_result(value), ""
    except BaseException as error:  # sys.exit() in a reward is a failure of this one score
        return None, _reason(error)


async def _serve_many(function: RewardFunction, requests: BinaryIO, replies: int, *, timeout_s: float) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
    running: set[asyncio.Task[None]] = set()
    while (data := await _read(reader)) is not None:
        task = asyncio.create_task(_score_async(function, _questions.decode(data), replies, timeout_s=timeout_s))
        running.add(task)
        task.add_done_callback(running.discard)


async def _score_async(function: RewardFunction, question: Question, replies: int, *, timeout_s: float) -> None:
    started_s = time.monotonic()
    result, reason, is_late = None, "", False
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            value = function(question.rollout, question.row)
            result = to_result(await value if inspect.isawaitable(value) else value)
    except BaseException as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            is_late = True
        else:
            reason = _reason(error)
    _reply(replies, Answer(question.key, time.monotonic() - started_s, result, reason, is_late))


def _prepare(setup: Setup) -> tuple[RewardFunction, bool]:
    """Import the function and call its module's `warm_up()` if there is one. Returns whether the function is async."""
    _limit_memory(setup.memory_gib)
    module, function = import_target(Target(**setup.target))
    warm(module, setup.args)
    return bind(function, setup.args), inspect.iscoroutinefunction(function)


def _limit_memory(memory_gib: float | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gib is not None:
        # Private writable memory, not address space: libraries reserve far more addresses than they use.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = int(memory_gib * (1 << 30))
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _take_pipes() -> tuple[BinaryIO, int]:
    """Move the messages off descriptors 0 and 1, so that a reward which prints or reads cannot disturb them."""
    requests, replies = os.fdopen(os.dup(0), "rb", buffering=1 << 16), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _read_blocking(requests: BinaryIO) -> bytes | None:
    header = requests.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return requests.read(int.from_bytes(header, "big"))


async def _read(reader: asyncio.StreamReader) -> bytes | None:
    try:
        header = await reader.readexactly(HEADER_BYTES)
        return await reader.readexactly(int.from_bytes(header, "big"))
    except asyncio.IncompleteReadError:
        return None


def _reply(replies: int, message: Loaded | Answer) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(replies, data) :]


async def _await(value: Awaitable[object]) -> Any:
    return await value


def _reason(error: BaseException) -> str:
    return (str(error) if isinstance(error, PosttrainError) else describe(error))[:MAX_REASON]


if __name__ == "__main__":
    main()
