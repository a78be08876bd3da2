"""Reads messages from JSON into records, checking every key, and writes them back.

    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1",
        "function": {"name": "weather", "arguments": {"city": "Paris"}}}], "train": false}

`train: false` excludes a turn from training; the names that other tools use for this are accepted too (`FLAGS`). An
unknown key is refused by its name: if it were ignored, as `thinking` would be, training would silently use something
else than the author meant. A key whose value is null or empty counts as absent, because tables of columns (parquet,
`datasets`) give every message every key. Left out: the order of the turns (turns.py).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.records import ContentPart, ImagePart, Message, TextPart, ToolCall

ROLES = ("system", "user", "assistant", "tool")
TEXT_ROLE = "text"  # the role of a text without turns
# Keys by which tools say that a turn is trained on, and keys by which they say that it is not.
FLAGS = ("train", "weight", "loss", "loss_mask", "loss_weight", "loss_scale", "trainable", "trained", "training")
INVERSE_FLAGS = ("masked",)
KNOWN_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *FLAGS, *INVERSE_FLAGS)
IMAGE_KEYS = ("image", "path", "url", "image_url")
# Others that hold a picture elsewhere. A part that has none of both is the place of a picture in a column.
_OTHER_IMAGE_KEYS = ("base64", "source", "data", "bytes", "file", "file_id", "blob")
SHOWN_CHARACTERS = 60

_USE_TRAIN = "to leave an assistant turn out of training, write train: false"
_USE_CONTENT = "write it in content, between the tags that the model's chat template uses, or remove it"
_USE_PARTS = 'write it as a part of content, {"type": "image", "image": path}'
# Keys that other tools know and this package does not, and what to write instead.
_ADVICE = {
    **dict.fromkeys(("mask", "train_detail", "loss_masks"), _USE_TRAIN),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content", "thoughts"), _USE_CONTENT),
    **dict.fromkeys(("image", "images"), _USE_PARTS),
    "function_call": "write it as tool_calls",
    "prefix": "a turn that the model should continue cannot be expressed; remove the key",
    "partial": "a turn that the model should continue cannot be expressed; remove the key",
}


class RowError(ValueError):
    """What is wrong with one row: the value got and the rule. The reader adds the file and the row number."""


def shown(value: object) -> str:
    """A value as error texts show it: its `repr`, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


# --- writing ---


def messages_to_json(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as JSON objects, which `to_messages` reads back as equal messages."""
    return [_message_to_json(message) for message in messages]


def _message_to_json(message: Message) -> dict[str, Any]:
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    if not isinstance(message.content, str):
        record["content"] = [_part_to_json(part) for part in message.content]
    if message.tool_calls:
        record["tool_calls"] = [tool_call_to_json(call) for call in message.tool_calls]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name, "train": message.trained}
    return {**record, **{key: value for key, value in optional.items() if value is not None}}


def _part_to_json(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image"} if part.image is None else {"type": "image", "image": part.image}


def tool_call_to_json(call: ToolCall) -> dict[str, Any]:
    """A call as chat templates expect it: OpenAI's form, but with the arguments as a mapping instead of JSON text."""
    identity = {} if call.id is None else {"id": call.id}
    return {"type": "function", **identity, "function": {"name": call.name, "arguments": dict(call.arguments)}}


# --- reading ---


def to_messages(value: Any, name: str, *, texts: bool = False) -> tuple[Message, ...]:
    """Read a list of JSON messages. Raises `RowError`.

    name: the row's field that holds the list, for the error text. texts: the list is one text without turns.
    """
    if texts:
        return (Message(TEXT_ROLE, _read_content(value[0]["content"], name, may_be_empty=False)),)
    if not isinstance(value, list) or not value:
        raise RowError(f"{name}: got {shown(value)}: must be a list of at least one message")
    return tuple(_to_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def is_absent(value: object) -> bool:
    """Whether a key with this value counts as absent: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _to_message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{name}: got {shown(item)}: must be an object with 'role' and 'content'")
    given = {key: value for key, value in item.items() if not is_absent(value)}
    role = _read_role(item.get("role"), name)
    _refuse_unknown(given, name)
    calls = _read_calls(given, role, name)
    if "tool_call_id" in given and role != "tool":
        raise RowError(f"{name}.tool_call_id: got {shown(given['tool_call_id'])}: only a tool turn answers a call")
    return Message(
        role,
        _read_content(item.get("content"), f"{name}.content", may_be_empty=bool(calls) or role == "tool"),
        calls,
        _read_optional_text(given, "tool_call_id", name),
        _read_optional_text(given, "name", name),
        _read_trained(given, role, name),
    )


def _read_role(role: object, name: str) -> str:
    if role in ROLES:
        return role
    target = {"developer": "system", "human": "user", "gpt": "assistant"}.get(str(role), "user")
    advice = f"; set roles, such as roles: {{{role}: {target}}}" if isinstance(role, str) and role else ""
    raise RowError(f"{name}.role: got {shown(role)}: must be one of {', '.join(ROLES)}{advice}")


def _refuse_unknown(given: Mapping[str, object], name: str) -> None:
    for key, value in given.items():
        if key not in KNOWN_KEYS:
            advice = _ADVICE.get(key, "remove it")
            known = ", ".join(KNOWN_KEYS)
            raise RowError(f"{name}.{key}: got {shown(value)}: not a key of a message ({known}); {advice}")


def _read_optional_text(given: Mapping[str, object], key: str, name: str) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"{name}.{key}: got {shown(value)}: must be text")
    _check_text(value, f"{name}.{key}")
    return value


def is_flag_set(value: object) -> bool | None:
    """The meaning of a flag: True for true or 1, False for false or 0, None for any other value."""
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _read_trained(given: Mapping[str, object], role: str, name: str) -> bool | None:
    """Whether the flags of a turn, such as `train: false` or OpenAI's `weight: 0`, include it in training.

    None if the turn has no such flag. Raises `RowError` for flags that contradict each other.
    """
    said: dict[str, bool] = {}
    for key in (*FLAGS, *INVERSE_FLAGS):
        if key not in given:
            continue
        flag = is_flag_set(given[key])
        if flag is None:
            raise RowError(f"{name}.{key}: got {shown(given[key])}: must be true or 1, or false or 0")
        said[key] = flag if key in FLAGS else not flag
    if role != "assistant":
        if wrong := next((key for key, trained in said.items() if trained), None):
            raise RowError(f"{name}.{wrong}: got {shown(given[wrong])}: only an assistant turn can be trained on")
        return None
    if len(set(said.values())) > 1:
        flags = " and ".join(f"{key} {shown(given[key])}" for key in said)
        raise RowError(f"{name}: {flags} contradict each other; keep one")
    return next(iter(said.values()), None)


def _read_content(content: object, name: str, *, may_be_empty: bool) -> str | tuple[ContentPart, ...]:
    """The content as text, or as parts if one of them is an image.

    A list that holds only text parts is joined to one text, with nothing in between. Chat templates that know parts
    render the same, and templates that know only text would fail on a list.
    """
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        parts = tuple(_read_part(part, f"{name}[{index}]") for index, part in enumerate(content))
        if any(isinstance(part, ImagePart) for part in parts):
            return parts
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
    if not isinstance(content, str):
        raise RowError(f"{name}: got {shown(content)}: must be text or a list of parts")
    if not content.strip() and not may_be_empty:
        raise RowError(f"{name}: is empty")
    _check_text(content, name)
    return content


def _read_part(part: object, name: str) -> ContentPart:
    if not isinstance(part, Mapping):
        raise RowError(f'{name}: got {shown(part)}: must be a part such as {{"type": "text", "text": ...}}')
    kind = part.get("type")
    if kind == "text":
        return _read_text_part(part, name)
    if kind in ("image", "image_url"):
        return _read_image_part(part, name)
    raise RowError(f"{name}.type: got {shown(kind)}: must be text or image")


def _read_text_part(part: Mapping[str, object], name: str) -> TextPart:
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError(f"{name}.text: got {shown(text)}: must be text")
    _check_text(text, f"{name}.text")
    return TextPart(text)


def _read_image_part(part: Mapping[str, object], name: str) -> ImagePart:
    key = next((key for key in IMAGE_KEYS if not is_absent(part.get(key))), None)
    if key is None:
        if other := next((key for key in _OTHER_IMAGE_KEYS if not is_absent(part.get(key))), None):
            raise RowError(f"{name}.{other}: a picture is not read from it; give a path or a data URL as image")
        return ImagePart()
    reference = part[key]
    if isinstance(reference, Mapping):  # OpenAI's {"url"}, or Hugging Face's {"path"}
        reference = next((reference[name] for name in ("url", "path") if not is_absent(reference.get(name))), None)
    if not isinstance(reference, str):
        raise RowError(f"{name}.{key}: got {shown(reference)}: must be a path or a URI")
    _check_text(reference, f"{name}.{key}")
    return ImagePart(reference)


def _read_calls(given: Mapping[str, object], role: str, name: str) -> tuple[ToolCall, ...]:
    calls = given.get("tool_calls")
    if calls is None:
        return ()
    if role != "assistant":
        raise RowError(f"{name}.tool_calls: got {shown(calls)}: only an assistant turn makes calls; remove it")
    if not isinstance(calls, list):
        raise RowError(f"{name}.tool_calls: got {shown(calls)}: must be a list of calls")
    read = tuple(_read_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls))
    ids = [call.id for call in read if call.id is not None]
    twice = next((identity for at, identity in enumerate(ids) if identity in ids[:at]), None)
    if twice is not None:
        raise RowError(f"{name}.tool_calls: two calls have the id {twice!r}: each needs its own")
    return read


def _read_call(call: object, name: str) -> ToolCall:
    """A call in OpenAI's form, {"id", "type": "function", "function": {"name", "arguments"}}, or the plain one,
    {"name", "arguments", "id"}."""
    if not isinstance(call, Mapping):
        raise RowError(f'{name}: got {shown(call)}: must be an object such as {{"name": ..., "arguments": {{...}}}}')
    kind = call.get("type")
    if kind not in (None, "function"):
        raise RowError(f"{name}.type: got {shown(kind)}: must be function")
    inner = call.get("function")
    body = call if inner is None else inner
    where = name if inner is None else f"{name}.function"
    if not isinstance(body, Mapping):
        raise RowError(f"{where}: got {shown(body)}: must be an object with 'name' and 'arguments'")
    function = body.get("name")
    if not isinstance(function, str) or not function.strip():
        raise RowError(f"{where}.name: got {shown(function)}: must be the name of a tool")
    _check_text(function, f"{where}.name")
    arguments = _read_arguments(body.get("arguments"), f"{where}.arguments")
    return ToolCall(function, arguments, _read_optional_text(call, "id", name) or None)


def _read_arguments(arguments: Any, name: str) -> dict[str, Any]:
    rule = "must be an object of arguments by name, or the JSON text of one"
    given = arguments
    if is_absent(arguments):
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{name}: got {shown(given)}: {rule} ({error})") from None
    if not isinstance(arguments, Mapping):
        raise RowError(f"{name}: got {shown(given)}: {rule}")
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"{name}: got {shown(given)}: {rule} ({error})") from None
    _check_text(text, name)
    return dict(arguments)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: character {error.start + 1} is half of a surrogate pair, which is not text") from None
