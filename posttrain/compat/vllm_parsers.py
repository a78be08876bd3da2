"""vLLM's parsers of calls: their names, read from its source, because importing vLLM takes seconds and a gigabyte."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from posttrain.compat.patches import patch


@cache
@patch(
    "vllm",
    "0.32.0",
    "gap",
    reason="vLLM tells the names of its parsers of calls only once it is imported. The name in a config is checked "
    "before a run, by processes that need nothing else of vLLM",
    reference="`_TOOL_PARSERS_TO_REGISTER` of vllm/tool_parsers/__init__.py",
    test="tests/test_tool_rows.py::test_the_names_of_parsers_are_those_of_vllm",
)
def tool_parsers() -> tuple[str, ...]:
    """The names of vLLM's parsers of calls, in order. vLLM is imported only if its source does not tell them."""
    found = importlib.util.find_spec("vllm")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        tree = ast.parse((Path(folder) / "tool_parsers" / "__init__.py").read_bytes())
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                (target,) = statement.targets
                if isinstance(target, ast.Name) and target.id == "_TOOL_PARSERS_TO_REGISTER":
                    return tuple(sorted(map(ast.literal_eval, filter(None, statement.value.keys))))
    from vllm.tool_parsers import ToolParserManager

    return tuple(sorted(ToolParserManager.list_registered()))
