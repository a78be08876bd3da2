"""A sandbox that is kept: many untrusted programs in it, one after the other, which share the files in /tmp.

    KeptSandbox.run ── job ──► keeper.py in the sandbox ──► a process for the program
                    ◄─ result ──        │ when it has ended, or is late: SIGKILL to everything that it started

The sandbox starts with the first program, and ends with `close`, with the thread that started it, and with any program
whose end is not waited for. Its files end with it. Left out: the state of an interpreter; each program has a new one.
"""

import asyncio
import contextlib
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from posttrain.scoring.sandbox.run import (
    SETUP_S,
    Limits,
    SandboxError,
    SandboxResult,
    limit_of,
    require_sandbox,
    start_of,
)

_KEEPER = Path(__file__).with_name("keeper.py")
_HEADER_BYTES = 4
_GRACE_S = 10.0  # how much later than the program's limit the keeper may answer
_NEVER_S = 10**7  # the keeper itself may live for any time; each program has its limit


class KeptSandbox:
    """One sandbox for programs of one origin. limits: of each program; disk_mib is of all together."""

    def __init__(self, limits: Limits | None = None):
        self._limits = limits or Limits()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process that holds the sandbox; None if there is none."""
        return self._process.pid if self._process is not None else None

    async def run(self, source: str, stdin: str = "", *, is_isolated: bool = False) -> SandboxResult:
        """Run a program and wait for its end.

        is_isolated: it cannot import what lies in /tmp. Raises SandboxError if it cannot be run, or if the sandbox is
        lost; the next call then starts a new one, without the files.
        """
        limits = self._limits
        job = {
            "source": source,
            "stdin": stdin,
            "is_isolated": is_isolated,
            "wall_s": limits.wall_s,
            "cpu_s": limits.cpu_s,
            "output_bytes": limits.output_bytes,
        }
        body = json.dumps(job).encode()
        async with self._turn:
            try:
                if self._process is None:
                    await self._start()
                async with asyncio.timeout(limits.wall_s + _GRACE_S):
                    found = await self._ask(len(body).to_bytes(_HEADER_BYTES, "big") + body)
                found["stdout"] = found["stdout"].encode("latin-1")
                result = SandboxResult(**found)
            except BaseException as error:  # also a call that is given up: its answer would come to the next one
                await self.close()
                if isinstance(
                    error, OSError | EOFError | ValueError | TypeError | KeyError
                ):  # TimeoutError is an OSError
                    raise SandboxError(f"the sandbox was lost with its files: {type(error).__name__}") from error
                raise
        limit = result.limit or limit_of(result.exit_code, result.stderr, result.wall_s)
        return replace(result, limit=limit)

    async def close(self) -> None:
        """End the sandbox and everything in it."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # the first process in the sandbox dies with this one, and all others with that
            await process.wait()

    async def _start(self) -> None:
        way = await asyncio.to_thread(require_sandbox)
        limits = replace(self._limits, cpu_s=_NEVER_S)
        ready, ready_write = os.pipe()
        try:
            with tempfile.TemporaryFile() as job_file:
                command, options = start_of(
                    way, _KEEPER.read_text(encoding="utf-8"), asdict(limits), job_file=job_file, ready_fd=ready_write
                )
                process = self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    **options,
                )
        finally:
            os.close(ready_write)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ready, "rb")
        )
        try:
            async with asyncio.timeout(SETUP_S):
                said = await reader.read()
        except TimeoutError:
            said = b""
        finally:
            transport.close()
        if said != b"ready":
            raise SandboxError(f"the sandbox could not be set up: process {process.pid} is not ready")

    async def _ask(self, data: bytes) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(data)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(_HEADER_BYTES), "big")
        if size > 8 * (self._limits.output_bytes + (1 << 16)):
            raise ValueError(f"an answer of {size} bytes")
        return json.loads(await process.stdout.readexactly(size))
