"""The program of an environment process: many episodes at once in one event loop.

Each episode is a coroutine. Before a step of it runs, its key is noted in a file that the stage maps, so that the stage
knows whose code was running when this process hung or died. An episode that waits too long is cancelled here; the stage
kills the process only where this process does not do so. Run as
`python -m posttrain.episodes.environment_process PARENT_PID`.
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, BinaryIO

import msgspec

from posttrain.episodes.session import ContextFullError, Session, WorldLostError, episode_result
from posttrain.episodes.toolbox.toolbox import Toolbox, ToolKit
from posttrain.episodes.wire import (
    Ask,
    Begin,
    Cancel,
    Ended,
    EnvironmentSetup,
    Full,
    LoadedEnvironment,
    Refused,
    Saved,
    Told,
)
from posttrain.records import Outcome, Row
from posttrain.sampling.progress import Progress
from posttrain.scoring.plugins.target import Target, import_target, warm
from posttrain.scoring.pool.pipes import begin_process, open_pipe, read, reason, reply
from posttrain.scoring.pool.wire import MAX_REPLY_BYTES, frame
from posttrain.scoring.sandbox.run import Limits

_orders = msgspec.msgpack.Decoder(Begin | Told | Full | Refused | Cancel)


def main() -> None:
    begun = begin_process(EnvironmentSetup, _load_all)
    if begun is None:
        return
    setup, (loaded, notes), requests, replies = begun
    functions = {name: function for name, (function, _) in loaded.items()}
    kits = {name: kit for name, (_, kit) in loaded.items()}
    asyncio.run(_Episodes(functions, kits, notes, timeout_s=setup.timeout_s, replies=replies).serve(requests))


_Loaded = tuple[Callable[..., Any], ToolKit]


def _load_all(setup: EnvironmentSetup) -> tuple[tuple[dict[str, _Loaded], Progress], bool]:
    limits = Limits(**setup.sandbox)
    return ({name: _load(item, limits) for name, item in setup.environments.items()}, Progress(setup.notes)), True


def _load(environment: LoadedEnvironment, limits: Limits) -> _Loaded:
    module, function = import_target(Target(**environment.target), "environment")
    warm(module, environment.args)
    return partial(function, **environment.args), ToolKit(environment.tools, limits, beside=module)


class _Episodes:
    """The episodes that run, by key."""

    def __init__(
        self,
        functions: dict[str, Callable[..., Any]],
        kits: dict[str, ToolKit],
        notes: Progress,
        *,
        timeout_s: float,
        replies: int,
    ):
        self._functions = functions
        self._kits = kits
        self._timeout_s = timeout_s
        self._notes = notes
        self._replies = replies
        self._running: dict[int, tuple[Session, asyncio.Task[None]]] = {}

    async def serve(self, requests: BinaryIO) -> None:
        """Work until the stage closes the pipe."""
        reader = await open_pipe(requests)
        while (data := await read(reader)) is not None:
            match _orders.decode(data):
                case Begin() as begin:
                    self._begin(begin)
                case Cancel(key):
                    if (running := self._running.pop(key, None)) is not None:
                        running[0].close("the stage has ended the episode")
                        running[1].cancel()
                case (Told() | Full() | Refused()) as answer:
                    if (running := self._running.get(answer.key)) is not None:
                        running[0].take(answer)

    def _begin(self, begin: Begin) -> None:
        deadline = asyncio.timeout(None)
        loop = asyncio.get_running_loop()

        def clock(runs: bool) -> None:
            if not deadline.expired():
                deadline.reschedule(loop.time() + self._timeout_s if runs else None)

        async def noted(work: Coroutine[Any, Any, Any]) -> Any:
            return await _noted(work, partial(self._notes.note, str(begin.key)), partial(self._notes.note, ""))

        toolbox = Toolbox(self._kits[begin.environment])
        session = Session(begin, self._send, clock, toolbox=toolbox, noted=noted)
        task = asyncio.create_task(self._run(begin, session, deadline, toolbox=toolbox))
        self._running[begin.key] = session, task

    def _send(self, message: Ask | Saved) -> None:
        if (size := len(frame(message))) > MAX_REPLY_BYTES:
            raise ValueError(f"the added turns have {size} bytes; at most {MAX_REPLY_BYTES} may be added at once")
        reply(self._replies, message)

    async def _run(self, begin: Begin, session: Session, deadline: asyncio.Timeout, *, toolbox: Toolbox) -> None:
        try:
            await self._play(begin, session, deadline)
        finally:
            await toolbox.close()

    async def _play(self, begin: Begin, session: Session, deadline: asyncio.Timeout) -> None:
        result, outcome, why, is_full = None, Outcome.SCORED, "", False
        try:
            async with deadline:
                deadline.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
                row = msgspec.convert(begin.row, Row)
                coroutine = self._functions[begin.environment](session, row)
                note = self._notes.note
                result = episode_result(
                    await _noted(coroutine, partial(note, str(begin.key)), partial(note, "")), session
                )
        except ContextFullError:
            result, is_full = episode_result(None, session, is_full=True), True
        except WorldLostError as error:
            outcome, why = Outcome.INFRASTRUCTURE, str(error)
        except BaseException as error:
            is_late = isinstance(error, TimeoutError) and deadline.expired()
            outcome = Outcome.TIMEOUT if is_late else Outcome.ERROR
            why = f"the environment did nothing for {self._timeout_s:g} s" if is_late else reason(error)
        session.close("the episode has ended")
        if self._running.pop(begin.key, None) is not None:
            added, rewards = tuple(session.added), tuple(session.rewards)
            ended = Ended(begin.key, added, rewards, result=result, outcome=outcome, reason=why, is_full=is_full)
            if len(frame(ended)) > MAX_REPLY_BYTES:
                why = f"the episode ended with more than {MAX_REPLY_BYTES} bytes of added turns and rewards"
                ended = Ended(begin.key, outcome=Outcome.ERROR, reason=why)
            reply(self._replies, ended)


@types.coroutine
def _noted(
    coroutine: Coroutine[Any, Any, Any], begins: Callable[[], None], ends: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """Run a coroutine, with a call before and after each of its steps. Returns its result."""
    value: Any = None
    error: BaseException | None = None
    while True:
        begins()
        try:
            waits_for = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as end:
            return end.value
        finally:
            ends()
        try:
            value, error = (yield waits_for), None
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as thrown:
            value, error = None, thrown


if __name__ == "__main__":
    main()
