"""The tools of one episode, in its environment process: calls one by name, and ends what they started.

A tool that fails answers with a text that begins with "Error:", which the policy reads; no tool ends an episode.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from posttrain.episodes.toolbox.builtin import MAX_CHARS, call_builtin, cut, names_of
from posttrain.episodes.toolbox.servers import ServerConnection
from posttrain.episodes.wire import BuiltinTool, FunctionTool, ProvidedTool, ServerTool
from posttrain.scoring.plugins.target import Target, describe, import_target
from posttrain.scoring.sandbox.kept import KeptSandbox
from posttrain.scoring.sandbox.run import Limits

_Call = Callable[[Mapping[str, Any]], Any]


class ToolKit:
    """The tools of an environment, loaded once in a process. Raises PluginError for one that cannot be.

    beside: the environment's module; functions of the same file are taken from it, so that they share its state.
    """

    def __init__(self, tools: Sequence[ProvidedTool], limits: Limits | None = None, beside: ModuleType | None = None):
        self.limits = limits or Limits()
        self.builtin = [name for tool in tools if isinstance(tool, BuiltinTool) for name in names_of(tool.group)]
        self.servers = [tool for tool in tools if isinstance(tool, ServerTool)]
        self.shared = {at: ServerConnection(tool) for at, tool in enumerate(self.servers) if tool.is_shared}
        if self.servers:
            import mcp  # noqa: F401  takes a second, which no call must wait for
        self.functions = {tool.name: _function(tool, beside) for tool in tools if isinstance(tool, FunctionTool)}


def _function(tool: FunctionTool, beside: ModuleType | None) -> Callable[..., Any]:
    if beside is not None and tool.target["path"] is not None and tool.target["path"] == beside.__file__:
        return getattr(beside, tool.name)
    return import_target(Target(**tool.target), "tool")[1]


class Toolbox:
    """What one episode may call. Use `close` at its end."""

    def __init__(self, kit: ToolKit):
        self._kit = kit
        self._sandbox: KeptSandbox | None = None
        self._own: dict[int, ServerConnection] = {}

    @property
    def names(self) -> list[str]:
        """The tools that can be called."""
        return [*self._kit.builtin, *self._kit.functions, *(name for one in self._kit.servers for name in one.names)]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The result of a call, as text. Raises KeyError for a tool that is not here.

        Calls of async functions and of MCP servers run side by side. Those of the built-in tools wait for each other in
        their order, because each finds the files that the one before has left. A plain function holds up all others.
        """
        if name in self._kit.builtin:
            if self._sandbox is None:
                self._sandbox = KeptSandbox(self._kit.limits)
            return await call_builtin(self._sandbox, self._kit.limits, name, arguments=arguments)
        if name in self._kit.functions:
            return await _call_function(self._kit.functions[name], arguments)
        place = next((at for at, server in enumerate(self._kit.servers) if name in server.names), None)
        if place is None:
            raise KeyError(name)
        connection = self._kit.shared.get(place) or self._own.get(place)
        if connection is None:
            connection = self._own[place] = ServerConnection(self._kit.servers[place])
        return cut(await connection.call(name, arguments), 4 * MAX_CHARS)

    async def close(self) -> None:
        """End what the tools started."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.close()
        for connection in self._own.values():
            await connection.close()


async def _call_function(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = await value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except Exception as error:
        return f"Error: {describe(error)}"
    return cut(text, 4 * MAX_CHARS)
