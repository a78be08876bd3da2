"""One process that runs rewards or environments: start it, send to it, hear from it, kill it with its children.

Deadlines and retries are the business of the pools. Standard error is read all the time and only its end is kept, so
that a plug-in may print as much as it likes.
"""

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from posttrain.actors.processes import ForkWatch, kill_marked
from posttrain.scoring.plugins.interpreter import client_environment
from posttrain.scoring.pool.wire import MARK, FrameBuffer

MAX_PROCESSES = 512  # that one of these processes may have, with all that they have started
_TAIL_BYTES = 4096
_DRAIN_S = 0.3
_READ_EVERY_S = 0.002  # many short answers are read at once: a read costs as much as several of them


class PluginProcess(asyncio.SubprocessProtocol):
    """A running process. It calls `on_messages(messages)` for replies and, after the last, `on_exit()` once.

    program: the module that it runs, with the id of this process as its argument. replies: the type of its replies.
    python: another interpreter that runs it; "" for this one.
    """

    def __init__(
        self,
        program: str,
        replies: Any,
        *,
        on_messages: Callable[[Iterator[Any]], None],
        on_exit: Callable[[], None],
        python: str = "",
    ):
        self._python = str(Path(python).expanduser()) if python else ""
        self._program = program
        self._on_messages = on_messages
        self._on_exit = on_exit
        self._buffer: FrameBuffer[Any] = FrameBuffer(replies)
        self._errors = bytearray()
        self._token = uuid.uuid4().hex
        self.forks = ForkWatch(MARK, self._token, MAX_PROCESSES)
        self._ended = asyncio.Event()
        self._drained = False
        self._transport: asyncio.SubprocessTransport | None = None
        self.exit_code: int | None = None

    async def start(self) -> None:
        """Start the process in a session of its own. Raises OSError if the system cannot."""
        loop = asyncio.get_running_loop()
        command = [self._python or sys.executable, "-m", self._program, str(os.getpid())]
        await loop.subprocess_exec(lambda: self, *command, start_new_session=True, env=self._environment())

    @property
    def pid(self) -> int:
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal such as SIGSTOP has frozen the process. Always False on a system without /proc."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    @property
    def stderr_tail(self) -> str:
        return self._errors.decode(errors="replace").strip()

    @property
    def how_it_ended(self) -> str:
        """Such as "was killed by SIGKILL; its last words: ...", once it has ended."""
        words = f"; its last words: {self.stderr_tail[-300:]}" if self.stderr_tail else ""
        return _exit_words(self.exit_code) + words

    def send(self, data: bytes) -> None:
        """Queue frames to be sent. If the process has just died, `on_exit` reports that, and nothing is raised here."""
        pipe = self._transport.get_pipe_transport(0) if self._transport is not None else None
        if pipe is not None and not pipe.is_closing():
            cast(asyncio.WriteTransport, pipe).write(data)

    def kill(self) -> None:
        """Send SIGKILL to the process, to its process group, and to everything that it started in other sessions."""
        if self._transport is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        kill_marked(MARK, self._token)

    async def close(self, grace_s: float = 0.5) -> None:
        """End the process: close its input, and send SIGKILL after `grace_s` seconds. Returns once it has ended."""
        if self._transport is None:
            return
        if self.exit_code is None and (pipe := self._transport.get_pipe_transport(0)) is not None:
            pipe.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), grace_s)
        self.kill()
        await self._ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # vLLM brings uvloop, whose transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._errors += data
            del self._errors[:-_TAIL_BYTES]
            return
        self._pause_reading()
        try:
            self._on_messages(self._buffer.feed(data))
        except (ValueError, KeyError, TypeError) as error:  # the plug-in wrote to the descriptor of the replies
            self._errors += f"\nbad reply: {error}".encode()
            self.kill()

    def _pause_reading(self) -> None:
        assert self._transport is not None
        pipe = cast(asyncio.ReadTransport | None, self._transport.get_pipe_transport(1))
        if pipe is not None and not pipe.is_closing():
            pipe.pause_reading()
            asyncio.get_running_loop().call_later(_READ_EVERY_S, _resume_reading, pipe)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._drained = True
            if self.exit_code is not None:
                self._end()

    def process_exited(self) -> None:
        assert self._transport is not None
        self.exit_code = self._transport.get_returncode()
        self.kill()  # its children may still run
        if self._drained:
            self._end()
        else:  # its last replies may still be in the pipe
            asyncio.get_running_loop().call_later(_DRAIN_S, self._end)

    def _end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            if self._transport is not None:
                self._transport.close()
            self._on_exit()

    def _environment(self) -> dict[str, str]:
        """The variables of the process: those of this process with its import path, one thread for numerical
        libraries, and the mark by which `kill` finds what it started.
        """
        if self._python:
            environment = {**client_environment(), MARK: self._token}
        else:
            paths = [path or os.getcwd() for path in sys.path]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), MARK: self._token}
        environment.setdefault("OMP_NUM_THREADS", "1")
        return environment


def _resume_reading(pipe: asyncio.ReadTransport) -> None:
    if not pipe.is_closing():
        pipe.resume_reading()


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"exited with code {code}"
