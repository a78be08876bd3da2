"""The rules for a whole conversation: the order of its turns, its last turn, and the parts that a stage can use."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from posttrain.data.messages import TEXT_ROLE, RowError, is_absent, shown
from posttrain.records import ImagePart, Message

Kind = Literal["supervised", "prompt"]

# Columns that hold images, videos or sounds beside the messages, as in TRL and in many chat datasets.
IMAGE_COLUMNS = ("images", "image")
MEDIA_COLUMNS = (*IMAGE_COLUMNS, "videos", "audios")
IMAGE_STAGES = (
    "filter",
    "sft",
    "dpo",
    "eval",
    "rl",
)  # kinds that take pictures where their config has a section `images`

_ALTERNATE = "after an optional first system turn, user and assistant alternate, user first"
_CALLS = "an assistant turn with tool_calls is followed by their results, in tool turns, and then by an assistant turn"
_ENDS = {"supervised": ("assistant",), "prompt": ("user", "tool")}


def check_turns(messages: Sequence[Message], name: str, kind: Kind) -> None:
    """Raise `RowError` unless the turns are in a valid order and the conversation ends as its kind requires.

    At most one system turn comes first; then user and assistant alternate. An assistant turn with tool calls is
    followed by their results and then by another assistant turn. A prompt ends with a user or tool turn. A supervised
    row ends with an assistant turn, and at least one of its assistant turns is trained on.

    name: the field that holds the turns, for the error text.
    """
    if messages[0].role == TEXT_ROLE:
        return
    start = 1 if messages[0].role == "system" else 0
    calling = -1  # index of the assistant turn whose calls the tool turns answer
    for index, message in enumerate(messages[start:], start):
        expected = _expected(messages[index - 1] if index > start else None)
        if message.role not in expected:
            rule = _CALLS if "tool" in (message.role, *expected) else _ALTERNATE
            roles = " or ".join(map(repr, expected))
            raise RowError(f"{name}[{index}].role: got {message.role!r}, expected {roles}: {rule}")
        if message.role == "assistant" and message.tool_calls:
            calling = index
        elif message.role == "tool" and (index + 1 == len(messages) or messages[index + 1].role != "tool"):
            _check_results(messages, name, calling, end=index + 1)
    if messages[-1].role not in _ENDS[kind]:
        what = "a supervised row" if kind == "supervised" else "a prompt"
        roles = " or ".join(map(repr, _ENDS[kind]))
        raise RowError(f"{name}: the last turn is {messages[-1].role!r}: {what} must end with {roles}")
    if kind == "supervised" and not any(is_learned(message) for message in messages):
        raise RowError(f"{name}: no assistant turn is trained on (train: false, weight: 0); remove the row")


def is_learned(message: Message) -> bool:
    """Whether supervised training trains on this turn: an assistant turn or a text without `trained=False`."""
    return message.role in ("assistant", TEXT_ROLE) and message.trained is not False


def _expected(before: Message | None) -> tuple[str, ...]:
    """The roles that may follow a turn. before: None for the first turn, or the first after a system turn."""
    if before is None or (before.role == "assistant" and not before.tool_calls):
        return ("user",)
    if before.role == "assistant":
        return ("tool",)
    return ("tool", "assistant") if before.role == "tool" else ("assistant",)


def _check_results(messages: Sequence[Message], name: str, calling: int, *, end: int) -> None:
    """Raise `RowError` unless the tool results in messages[calling + 1 : end] answer the calls of messages[calling].

    They are matched by id where both have one; otherwise only their number is compared.
    """
    calls = messages[calling].tool_calls
    open_ids = [call.id for call in calls if call.id is not None]
    for index in range(calling + 1, end):
        identity = messages[index].tool_call_id
        if identity is None or not any(call.id is not None for call in calls):
            continue
        if identity not in open_ids:
            known = ", ".join(repr(call.id) for call in calls)
            rule = f"must be the id of a call of {name}[{calling}] that has no result yet (its calls: {known})"
            raise RowError(f"{name}[{index}].tool_call_id: got {identity!r}: {rule}")
        open_ids.remove(identity)
    results = messages[calling + 1 : end]
    if len(results) > len(calls):
        raise RowError(f"{name}[{calling}]: {len(calls)} tool_calls, but {len(results)} results in tool turns follow")
    if open_ids and all(result.tool_call_id is not None for result in results):
        raise RowError(f"{name}[{calling}].tool_calls: the call {open_ids[0]!r} has no result; {_CALLS}")


def tools_of(fields: Mapping[str, object]) -> list[dict[str, Any]] | None:
    """The function schemas in the column `tools` of a row, in the form that chat templates take; None if it has none.

    fields: the row's columns. `tools` holds a list of JSON schemas of functions, or the JSON text of such a list.
    Raises `RowError` for anything else.
    """
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        with suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if is_absent(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"tools: got {shown(tools)}: must be a list of function schemas, or its JSON text")
    return [dict(tool) for tool in tools]


def check_usable(
    messages: Sequence[Message], fields: Mapping[str, object], *, name: str, stage: str, images: bool = False
) -> None:
    """Raise `RowError` for a part of a row that a stage does not use: images, unless it takes them; videos and sounds.
    Also raise it for declared tools that are not schemas.

    The stage must not ignore them silently. fields: the row's other columns. name: the field that holds the messages.
    images: whether the stage takes the pictures of the messages.
    """
    way = "set images: {} for a multimodal model, or remove" if stage in IMAGE_STAGES else "remove"
    what = f"stage {stage} works on text only; {way}"
    for index, message in enumerate(messages):
        has_image = not isinstance(message.content, str) and any(isinstance(p, ImagePart) for p in message.content)
        if has_image and not images:
            raise RowError(f"{name}[{index}] has an image; {what} the row")
    for column in MEDIA_COLUMNS:
        if not is_absent(fields.get(column)):
            value = shown(fields[column])
            if column not in IMAGE_COLUMNS:
                raise RowError(f"{column}: got {value}; only text and pictures can be used; remove the row or column")
            raise RowError(f"{column}: got {value}; {what} the row or the column")
    tools_of(fields)
