"""The schemas of tools that are Python functions, from their parameters and docstring alone: no code is executed."""

import ast
from pathlib import Path
from typing import Any

from posttrain.errors import PluginError

_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, list, dict, tuple)}


def function_schema(path: Path, name: str, line: int = 1) -> dict[str, Any]:
    """The schema of a function of a file. line: which line names it, for the error. Raises PluginError."""
    from transformers.utils.chat_template_utils import get_json_schema

    tree = ast.parse(path.read_bytes())
    functions = [item for item in tree.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    node = next((item for item in functions if item.name == name), None)
    if node is None:
        raise PluginError(f"{path}:{line}: tool {name!r} is no function of this file")
    text = ast.get_docstring(node) or ""
    bare = ast.FunctionDef(node.name, node.args, [ast.Expr(ast.Constant(text))], [], node.returns)
    module = ast.fix_missing_locations(ast.Module([bare], []))
    found: dict[str, Any] = {"__builtins__": {}, **_TYPES}
    try:
        exec(compile(module, str(path), "exec"), found)
        schema = get_json_schema(found[node.name])
    except Exception as error:
        raise PluginError(
            f"{path}:{node.lineno}: tool {node.name!r}: {error}; a tool has a type for every parameter "
            f"({', '.join(_TYPES)}), and a docstring with a line for each under Args:"
        ) from None
    schema["function"].pop("return", None)
    return schema
