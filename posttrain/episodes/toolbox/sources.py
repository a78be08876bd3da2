"""What `environment.tools` in the YAML names, found and checked without running it.

    tools:
      - python                     a built-in tool, or several: python, files
      - tools.py:look_up           a function with types and a docstring; module:function too
      - mcp: {command: [...]}      the tools of an MCP server
      - {type: function, ...}      a schema, whose calls the environment answers itself

The schema of a function is read from its source. Its code runs in the environment processes only. An MCP server is
started once, to be asked for its tools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from msgspec.structs import replace

from posttrain.config.base import validate_config
from posttrain.config.environments import McpServerConfig
from posttrain.episodes.schemas import function_schema
from posttrain.episodes.toolbox.builtin import SCHEMAS
from posttrain.episodes.toolbox.servers import server_tools
from posttrain.episodes.wire import BuiltinTool, FunctionTool, ProvidedTool, ServerTool
from posttrain.errors import PluginError
from posttrain.scoring.plugins.lookup import function_file, resolve_function

_FORMS = (
    f"a tool is one of {', '.join(SCHEMAS)}, a function (path/to/file.py:function or package.module:function), an MCP "
    'server {"mcp": {"command": [...]}}, or a schema {"type": "function", "function": {"name": ...}}'
)


def provided_tools(tools: Sequence[Any]) -> list[ProvidedTool]:
    """The tools that the environment processes execute; schemas that are written out are none. Raises PluginError."""
    return [tool for tool, _ in map(_found, tools) if tool is not None]


def tool_schemas(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The schemas of all tools, in order. Raises PluginError."""
    return [schema for _, schemas in map(_found, tools) for schema in schemas]


def _found(tool: Any) -> tuple[ProvidedTool | None, list[dict[str, Any]]]:
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        return None, [dict(tool)]
    if isinstance(tool, Mapping) and set(tool) == {"mcp"}:
        return _server(tool["mcp"])
    if isinstance(tool, str) and tool in SCHEMAS:
        return BuiltinTool(tool), SCHEMAS[tool]
    if isinstance(tool, str) and ":" in tool:
        target = resolve_function(tool, "tool")
        path = function_file(target)
        if path is None:
            raise PluginError(f"tool {tool!r}: there is no source of module {target.module!r}; write its schema out")
        return FunctionTool(target.function, asdict(target)), [function_schema(path, target.function)]
    raise PluginError(f"{str(tool)[:80]!r} is no tool; {_FORMS}")


def _server(section: Any) -> tuple[ProvidedTool, list[dict[str, Any]]]:
    if not isinstance(section, Mapping):
        raise PluginError(f"tool mcp: got {str(section)[:80]!r}; write mcp: {{command: [program, argument, ...]}}")
    config = validate_config(McpServerConfig, dict(section), "tool mcp")
    server = ServerTool(
        tuple(config.command), config.env, is_shared=config.shared, start_s=config.start_s, call_s=config.call_s
    )
    schemas = server_tools(server)
    return replace(server, names=tuple(schema["function"]["name"] for schema in schemas)), schemas
