"""The tools that the policy is shown: those of the row, else those of the YAML, else those of the environment's file.

A file declares them beside its environments, as the fields of a row that it needs:

    TOOLS = {"calculator": [calculate]}
    REQUIRES = {"calculator": ["answer"]}

A tool is a function of the same file with types and a docstring, or what the YAML may name (toolbox/sources.py). The
file is read and not executed: of a function only the parameters and the docstring are looked at.
"""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config.environments import EnvironmentConfig, EnvironmentFunctionConfig
from posttrain.data.chat import RenderRow, render_prompt
from posttrain.data.images.render import Pictures, pictures_of, prompt_with_pictures
from posttrain.data.messages import RowError
from posttrain.data.stored import pick
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.episodes.calls import parser_of
from posttrain.episodes.toolbox.sources import provided_tools, tool_schemas
from posttrain.episodes.wire import ProvidedTool
from posttrain.errors import DataError, PluginError
from posttrain.records import Message, Row
from posttrain.scoring.plugins.lookup import ENVIRONMENT, RewardSpec, check_environment, function_file, resolve
from posttrain.scoring.plugins.requirements import check_fields

_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")


def row_renderer(tokenizer: Tokenizer, config: EnvironmentConfig | None, pictures: Pictures | None = None) -> RenderRow:
    """The function that renders messages as a prompt with the tools of their row, and with the tokens of its pictures.

    pictures: None for a stage that takes none. The function raises ConfigError if the policy may call tools in an
    episode, and no parser is known that reads the calls.
    """
    is_known = False  # which parser reads calls

    def render(row: Row, messages: Sequence[Message]) -> Sequence[int]:
        nonlocal is_known
        tools = row_tools(config, row) or None
        if tools and not is_known and config is not None and config.key_of(row.capability) is not None:
            parser_of(tokenizer, config.tool_parser)
            is_known = True
        if pictures is None or not pictures_of(messages):
            return render_prompt(tokenizer, messages, tools)
        return prompt_with_pictures(tokenizer, messages, pictures.store, rule=pictures.rule, tools=tools).ids

    return render


def row_tools(config: EnvironmentConfig | None, row: Row) -> list[dict[str, Any]]:
    """The schemas of the tools that the policy is shown with a row, also one without an environment. Raises DataError
    for schemas of the row that are wrong, and PluginError for those of the environment."""
    try:
        own = tools_of(row.fields)
    except RowError as error:
        raise DataError(f"row {row.id!r}: {error}") from None
    if own:
        if problem := tools_problem(own):
            raise DataError(f"row {row.id!r}: tools: {problem}")
        return own
    key = config.key_of(row.capability) if config is not None else None
    return [] if config is None or key is None else environment_tools(config.functions[key])


def check_environment_rows(config: EnvironmentConfig | None, rows: Sequence[Row]) -> Sequence[Row]:
    """Check the environments, and the rows that they would get. Returns the rows that the stage's `reward` scores.

    Raises PluginError for an environment that is wrong, and DataError for rows that lack a field which it needs.
    """
    if config is None:
        return rows
    check_shown(config, rows)
    for key, function in config.functions.items():
        check_environment(function.name, function.args, python=function.python or "")
        environment_tools(function)
        own = (row for row in rows if config.key_of(row.capability) == key)
        check_fields(RewardSpec(function.name, function.args), own, kind=ENVIRONMENT)
    return pick(rows, [place for place, row in enumerate(rows) if not config.gives_reward(row.capability)])


def check_shown(config: EnvironmentConfig, rows: Iterable[Row]) -> None:
    """Raise DataError for a row with pictures that an environment would get."""
    for row in rows:
        if config.key_of(row.capability) is not None and pictures_of(row.messages):
            raise DataError(
                f"row {row.id!r}: it has pictures, and its capability {row.capability!r} an environment; episodes take "
                "text only; name environments by other capabilities (environment.by_capability), or remove the row"
            )


def environment_tools(environment: EnvironmentFunctionConfig) -> list[dict[str, Any]]:
    """The tools of an environment, without those of a row. Raises PluginError if a schema is wrong."""
    if environment.tools is None:
        tools, where = declared_tools(environment.name), f"environment {environment.name!r}: TOOLS"
    else:
        tools, where = tool_schemas(environment.tools), f"environment {environment.name!r}: tools"
    if problem := tools_problem(tools):
        raise PluginError(f"{where}: {problem}")
    return tools


def tools_problem(tools: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with schemas of tools; "" if nothing is."""
    from jsonschema import Draft202012Validator, SchemaError

    names: set[str] = set()
    for place, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping):
            return f'[{place}] is {str(dict(tool))[:80]}; a tool is {{"type": "function", "function": {{"name": ...}}}}'
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return f"[{place}].function.name is {name!r}; it must be a name of letters, digits and _ . -"
        if name in names:
            return f"two tools have the name {name!r}; each needs its own"
        names.add(name)
        try:
            Draft202012Validator.check_schema(dict(function.get("parameters") or {}))
        except (SchemaError, TypeError, ValueError) as error:
            why = getattr(error, "message", str(error))
            return f"the parameters of {name!r} are no JSON schema: {why}"
    return ""


def environment_provided(environment: EnvironmentFunctionConfig) -> list[ProvidedTool]:
    """The tools of an environment that its processes execute. Raises PluginError."""
    return provided_tools(_declared(environment.name) if environment.tools is None else environment.tools)


@cache
def declared_tools(name: str) -> list[dict[str, Any]]:
    """The tools that an environment's file declares for it; none if it declares none. Raises PluginError."""
    return tool_schemas(_declared(name))


@cache
def _declared(name: str) -> list[Any]:
    """What the file declares, as it would be written in the YAML."""
    target = resolve(name, ENVIRONMENT)
    path = function_file(target)
    if path is None:
        return []
    tree = ast.parse(path.read_bytes())
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(one, ast.Name) and one.id == "TOOLS" for one in targets):
                entries = _entries(path, statement.value, target.function)
                return [_written(path, entry, target.path or target.module) for entry in entries]
    return []


def _entries(path: Path, value: ast.expr, function: str) -> list[ast.expr]:
    if isinstance(value, ast.Dict):
        for key, entry in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == function and isinstance(entry, ast.List | ast.Tuple):
                return entry.elts
        if all(isinstance(key, ast.Constant) for key in value.keys):
            return []
    raise PluginError(
        f'{path}:{value.lineno}: TOOLS must be written out, as in {{"{function}": [function, ...]}}: a mapping of an '
        "environment's name to a list of functions of this file, or of schemas"
    )


def _written(path: Path, entry: ast.expr, where: str) -> Any:
    if isinstance(entry, ast.Name):
        return f"{where}:{entry.id}"
    try:
        return ast.literal_eval(entry)
    except (ValueError, TypeError):
        raise PluginError(
            f"{path}:{entry.lineno}: a tool in TOOLS must be a function of this file, or what the YAML may name"
        ) from None
