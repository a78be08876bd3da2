"""The process of one agent: it reads its row on standard input, and is killed with everything that it started.

It is in a session of its own, and it and its children carry a mark in their environment. The limit of memory is that
of the environment process, which it inherits.
"""

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

from posttrain.actors.parent import die_with_parent
from posttrain.actors.processes import ForkWatch, kill_marked
from posttrain.errors import PluginError
from posttrain.scoring.plugins.commands import is_own_python, search_path

_VARIABLE = "POSTTRAIN_AGENT"
_OUTPUT_BYTES = 1 << 16  # of the end of the output, in which the last line is looked for
_ERROR_BYTES = 1 << 12
_WORDS = 400
_DRAIN_S = 1.0
_LOOK_S = 0.02
_LOOKS = 10  # at whether it has ended, for one at how many processes it has
MAX_PROCESSES = 512  # that an agent may have, with all that it has started
_CHUNK_BYTES = 1 << 16


class AgentProcess:
    """One run of a command. variables: of its environment, beside those of this process."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]):
        self._command = list(command)
        self._variables = variables
        self._token = uuid.uuid4().hex
        self._process: asyncio.subprocess.Process | None = None
        self._output = bytearray()
        self._errors = bytearray()

    async def run(self, given: bytes) -> int:
        """Run to the end and return the exit code, which is negative for a signal. given: its standard input.

        Its process, and whatever it started, is dead afterwards, also if the caller is cancelled. Raises OSError if it
        cannot be started, and PluginError if it starts processes without end.
        """
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=self._environment(),
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        reading = [
            asyncio.ensure_future(_keep_end(process.stdout, self._output, _OUTPUT_BYTES)),
            asyncio.ensure_future(_keep_end(process.stderr, self._errors, _ERROR_BYTES)),
            asyncio.ensure_future(_give(process.stdin, given)),
        ]
        try:
            # `wait` of asyncio also waits for its pipes, which a child of the agent may hold open for ever.
            forks, looks = ForkWatch(_VARIABLE, self._token, MAX_PROCESSES), count(1)
            while process.returncode is None:
                await asyncio.sleep(_LOOK_S)
                if next(looks) % _LOOKS == 0 and forks.is_over():
                    raise PluginError(f"the agent had more than {MAX_PROCESSES} processes")
            return process.returncode
        finally:
            self._kill()
            await asyncio.wait(reading, timeout=_DRAIN_S)
            for one in reading:
                one.cancel()

    @property
    def last_line(self) -> str:
        """The last line of its output that is not empty; "" if there is none."""
        lines = self._output.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return end_of(self._errors.decode(errors="replace"))

    def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        kill_marked(_VARIABLE, self._token)

    def _environment(self) -> dict[str, str]:
        """The variables of this process and those given. `python` is the interpreter that runs this package, and only
        that one is given its import path."""
        environment = {**os.environ, "PATH": search_path(), **self._variables, _VARIABLE: self._token}
        if not is_own_python(self._command[0]):
            environment.pop("PYTHONPATH", None)
        for name in ("NO_PROXY", "no_proxy"):  # a client that knows a proxy would send the calls there
            environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
        return environment


def end_of(text: str) -> str:
    """The end of a text for a message: of a last line that is too long, such as that of a long error, its beginning."""
    text = text.strip()
    last = text.rpartition("\n")[2]
    return text[-_WORDS:] if len(last) <= _WORDS else f"{last[:_WORDS]}..."


async def _keep_end(reader: asyncio.StreamReader, end: bytearray, size: int) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        end += data
        del end[:-size]


async def _give(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it need not read
        writer.write(data)
        await writer.drain()
        writer.close()
