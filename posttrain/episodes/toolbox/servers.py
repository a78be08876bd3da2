"""MCP servers over stdio as tools, by the package `mcp`: what a server offers, and calls with deadlines.

A server is a process of its own, in a process group that is killed with it, and it dies with the process that started
it. Whatever it does, a call has a result: one that hangs, exits or breaks the protocol is an error that the policy
reads. It is then replaced at the next call, and what it kept in memory is lost.

Left out: servers over HTTP, and what servers ask of clients (sampling, elicitation, roots).
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from typing import IO, Any

from posttrain.episodes.wire import ServerTool
from posttrain.errors import PluginError
from posttrain.scoring.pool.wire import MARK

_MAX_PAGES = 100
_TAIL = 300
# Becomes the server, after it has asked Linux to be killed when its parent ends.
_BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class ServerConnection:
    """One running server, and a session with it. Use `open`, then `call`, then `close`, from any task of one loop."""

    def __init__(self, server: ServerTool):
        self._server = server
        self._session: Any = None
        self._closing = asyncio.Event()
        self._opening = asyncio.Lock()
        self._life: asyncio.Task[None] | None = None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The result of a call as text. It begins with "Error:" if the call failed; the next may meet a new server."""
        life: asyncio.Task[None] | None = None
        try:
            async with self._opening:  # episodes may share the server
                session = self._session or await self._open()
                life = self._life
            async with asyncio.timeout(self._server.call_s):
                result = await session.call_tool(name, dict(arguments))
        except TimeoutError:
            await self._end(life)
            return f"Error: {self._name} did not answer within {self._server.call_s:g} s, and was ended"
        except PluginError as error:
            return f"Error: {error}"
        except Exception as error:
            if life is None or life is not self._life or life.done() or _is_closed(error):
                await self._end(life)
                return f"Error: {self._name} has ended"
            return f"Error: {str(error)[:1000] or type(error).__name__}"
        except BaseException:
            await self._end(life)
            raise
        return _text(result)

    async def close(self) -> None:
        """End the server and its children."""
        life, self._life, self._session = self._life, None, None
        if life is not None:
            self._closing.set()
            await asyncio.gather(life, return_exceptions=True)

    async def _end(self, life: asyncio.Task[None] | None) -> None:
        """End the server, unless another call has done so, and a new one may be there already."""
        if life is self._life:
            await self.close()

    @property
    def _name(self) -> str:
        return f"the MCP server {' '.join(self._server.command)[:80]!r}"

    async def _open(self) -> Any:
        """Raises PluginError if the server does not start within its time."""
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._life = asyncio.create_task(self._live(opened, self._closing))
        try:
            self._session = await opened
        except asyncio.CancelledError:
            await self.close()
            raise
        return self._session

    async def _live(self, opened: asyncio.Future[Any], closing: asyncio.Event) -> None:
        """The life of a server. One task begins and ends it, as anyio's scopes want it."""
        try:
            async with _running(self._server, None) as session:
                opened.set_result(session)
                await closing.wait()
        except Exception as error:
            if not opened.done():
                opened.set_exception(_bare(error))


def server_tools(server: ServerTool) -> list[dict[str, Any]]:
    """The schemas of the tools that a server offers. It is started once for this. Raises PluginError if it does not
    start, or does not tell its tools, within its time."""
    program = server.command[0]
    if shutil.which(program, path=server.env.get("PATH", os.environ.get("PATH"))) is None:
        raise PluginError(f"the MCP server {' '.join(server.command)[:80]!r}: there is no program {program!r}")
    return _listed(json.dumps(list(server.command)), json.dumps(dict(server.env)), server.start_s)


@cache
def _listed(command: str, env: str, start_s: float) -> list[dict[str, Any]]:
    server = ServerTool(tuple(json.loads(command)), json.loads(env), start_s=start_s)
    with tempfile.TemporaryFile("w+") as errors, ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, _list(server, errors)).result()  # the caller's thread may have a loop
        except Exception as error:
            raise _bare(error) from None


async def _list(server: ServerTool, errors: IO[str]) -> list[dict[str, Any]]:
    from mcp.types import PaginatedRequestParams

    tools: list[Any] = []
    async with _running(server, errors) as session:
        with _told(server, errors):
            async with asyncio.timeout(server.start_s):
                page = await session.list_tools()
                for _ in range(_MAX_PAGES):
                    tools += page.tools
                    if not page.next_cursor:
                        break
                    page = await session.list_tools(params=PaginatedRequestParams(cursor=page.next_cursor))
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in tools
    ]


@asynccontextmanager
async def _running(server: ServerTool, errors: IO[str] | None) -> AsyncIterator[Any]:
    """A server that has answered the greeting, and the session with it. errors: gets what it writes to stderr."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # what a server prints between its messages is no event
    mark = {MARK: os.environ[MARK]} if MARK in os.environ else {}
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-I", "-S", "-c", _BOUND, *server.command],
        env={**mark, **server.env},
        encoding_error_handler="replace",
    )
    with contextlib.ExitStack() as files:
        log: Any = errors or files.enter_context(open(os.devnull, "w"))
        async with stdio_client(parameters, errlog=log) as (read, write), ClientSession(read, write) as session:
            with _told(server, errors):
                async with asyncio.timeout(server.start_s):
                    await session.initialize()
            yield session


@contextlib.contextmanager
def _told(server: ServerTool, errors: IO[str] | None) -> Any:
    """Raises what goes wrong within as a PluginError that names the server."""
    try:
        yield
    except Exception as error:
        late = isinstance(error, TimeoutError)
        why = f"did not answer within {server.start_s:g} s" if late else f"could not be started: {str(error)[:_TAIL]}"
        words = ""
        if errors is not None:
            errors.seek(0)
            words = errors.read()[-_TAIL:].strip()
        said = f"; its last words: {words}" if words else ""
        raise PluginError(f"the MCP server {' '.join(server.command)[:80]!r} {why}{said}") from None


def _bare(error: Exception) -> Exception:
    """The error in the groups of one that anyio makes of it."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _is_closed(error: Exception) -> bool:
    from mcp.types import CONNECTION_CLOSED

    return type(error).__name__ in ("ClosedResourceError", "BrokenResourceError") or (
        getattr(getattr(error, "error", None), "code", None) == CONNECTION_CLOSED
    )


def _text(result: Any) -> str:
    """The content of a result as text. What is no text is named by its kind."""
    parts = [part.text if part.type == "text" else f"[{part.type}]" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(parts)
    return f"Error: {text}" if result.is_error and not text.startswith("Error:") else text
