"""Checks that a chat template shows tool calls, tool results and declared tools.

Many templates omit what they do not know. The model would then learn to answer from results that it never sees. To
find out, each such part of the conversation is changed in turn and rendered again: if the token ids stay the same, the
template does not show that part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.errors import DataError

Tools = Sequence[Mapping[str, Any]] | None
Render = Callable[[list[dict[str, Any]], Tools], list[int]]


def require_tools_shown(render: Render, dicts: list[dict[str, Any]], tools: Tools, *, ids: list[int]) -> None:
    """Raise `DataError` if the template omits a tool call, a tool result or the declared tools.

    render: makes token ids of messages and tools, and raises `DataError` if the template refuses them. ids: the token
    ids that it makes of `dicts` and `tools`.
    """
    variants = [(where, variant, tools) for where, variant in _tool_variants(dicts)]
    for place, tool in enumerate(tools or ()):
        # Some templates only change their instructions if there are tools, so each tool is looked for by its name.
        changed = [*list(tools or ())[:place], _renamed(tool), *list(tools or ())[place + 1 :]]
        variants.append(("the row's `tools`", dicts, changed))
    for where, variant, shown_tools in variants:
        try:
            same = render(variant, shown_tools) == ids
        except DataError:  # the template refuses the changed conversation, so it does read this part
            continue
        if same:
            raise DataError(
                f"the chat template leaves out {where}; set a chat_template that shows tools beside the model's path, "
                "or remove the row"
            )


def _renamed(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool with another name, in OpenAI's form or without the frame."""
    function = tool.get("function")
    if isinstance(function, Mapping):
        return {**tool, "function": {**function, "name": f"other_{function.get('name')}"}}
    return {**tool, "name": f"other_{tool.get('name')}"}


def _tool_variants(dicts: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(description, conversation with only this part changed) for each tool call and tool result."""
    for index, item in enumerate(dicts):
        before, after = dicts[:index], dicts[index + 1 :]
        calls = item.get("tool_calls") or []
        if item["role"] == "tool" or (calls and item["content"]):
            what = "the result" if item["role"] == "tool" else "the text beside the calls"
            yield f"{what} in message {index}", [*before, {**item, "content": f"{item['content']} changed"}, *after]
        for at, call in enumerate(calls):
            function = call["function"]
            other_name = {**function, "name": f"other_{function['name']}"}
            other_arguments = {**function, "arguments": {**function["arguments"], "changed": 1}}
            for what, other in (("name", other_name), ("arguments", other_arguments)):
                changed = [*calls[:at], {**call, "function": other}, *calls[at + 1 :]]
                where = f"the {what} of the call of {function['name']!r} in message {index}"
                yield where, [*before, {**item, "tool_calls": changed}, *after]
