"""The side of a plug-in process that talks to its pool: frames on pipes that the plug-in cannot disturb, and limits.

What runs in such a process imports neither torch nor pydantic, so that it starts in about 0.1 s.
"""

import asyncio
import os
import resource
import sys
from collections.abc import Callable
from typing import BinaryIO, Protocol, TypeVar

import msgspec
from msgspec import Struct

from posttrain.actors.parent import die_with_parent
from posttrain.errors import PosttrainError
from posttrain.scoring.plugins.results import MAX_REASON
from posttrain.scoring.plugins.target import describe
from posttrain.scoring.pool.wire import HEADER_BYTES, Loaded, frame


class LimitedSetup(Protocol):
    """What a process is told to load. memory_gib: see `limit_memory`."""

    @property
    def memory_gib(self) -> float | None: ...


S = TypeVar("S", bound=LimitedSetup)
T = TypeVar("T")


def begin_process(setup_type: type[S], load: Callable[[S], tuple[T, bool]]) -> tuple[S, T, BinaryIO, int] | None:
    """The beginning of the program of a plug-in process, which ends with the process PARENT_PID (its first argument).

    Reads what it is to load, a `setup_type` with `memory_gib`, and loads it under that limit of memory. load: gives
    what is loaded, and whether it takes many requests at once. Returns the setup, what is loaded, and the pipes for
    requests and replies; None if there is nothing to do, or the load failed, which the pool is then told of.
    """
    die_with_parent(int(sys.argv[1]))
    requests, replies = take_pipes()
    data = read_blocking(requests)
    if data is None:
        return None
    setup = msgspec.msgpack.decode(data, type=setup_type)
    try:
        limit_memory(setup.memory_gib)
        loaded, is_async = load(setup)
    except BaseException as error:
        reply(replies, Loaded(failed=reason(error)))
        return None
    reply(replies, Loaded(is_async=is_async))
    return setup, loaded, requests, replies


def limit_memory(memory_gib: float | None) -> None:
    """Let this process write no core files, and use at most so much private memory; None sets no limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gib is not None:
        # Private writable memory, not address space: libraries reserve far more addresses than they use.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = int(memory_gib * (1 << 30))
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def take_pipes() -> tuple[BinaryIO, int]:
    """Move the messages off descriptors 0 and 1, so that a plug-in which prints or reads cannot disturb them."""
    requests, replies = os.fdopen(os.dup(0), "rb", buffering=1 << 16), os.dup(1)
    os.register_at_fork(after_in_child=lambda: _let_go(requests.fileno(), replies))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _let_go(*descriptors: int) -> None:
    """In a child that a plug-in forks: the messages are those of its parent, so it reads and writes nothing there."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def read_blocking(requests: BinaryIO) -> bytes | None:
    """The body of the next frame; None at the end."""
    header = requests.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return requests.read(int.from_bytes(header, "big"))


async def open_pipe(requests: BinaryIO) -> asyncio.StreamReader:
    """The pipe as a stream of the running event loop."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
    return reader


async def read(reader: asyncio.StreamReader) -> bytes | None:
    """The body of the next frame; None at the end."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
        return await reader.readexactly(int.from_bytes(header, "big"))
    except asyncio.IncompleteReadError:
        return None


def reply(replies: int, message: Struct) -> None:
    """Send a message. replies: the descriptor."""
    data = memoryview(frame(message))
    while data:
        data = data[os.write(replies, data) :]


def reason(error: BaseException) -> str:
    """What is told of an exception: the message of one of ours, else with its type and line."""
    return (str(error) if isinstance(error, PosttrainError) else describe(error))[:MAX_REASON]
