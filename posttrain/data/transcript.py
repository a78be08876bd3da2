"""Messages as plain text, for a judge, a page or a log. What a model is trained on is rendered by chat.py."""

import json
from collections.abc import Sequence

from posttrain.records import ImagePart, Message, ToolCall


def transcript(messages: Sequence[Message]) -> str:
    """A conversation with the role before each turn."""
    return "\n\n".join(f"[{message.role}]\n{message_text(message)}" for message in messages)


def message_text(message: Message) -> str:
    """All that a turn says: its text, its images by name, and each call as `weather({"city": "Paris"})`."""
    text = message.text
    if not isinstance(message.content, str):
        text = "".join(_image(part) if isinstance(part, ImagePart) else part.text for part in message.content)
    return "\n".join([*([text] if text or not message.tool_calls else []), *map(_call, message.tool_calls)])


def _image(part: ImagePart) -> str:
    return f"[image {part.image}]" if part.image else "[image]"


def _call(call: ToolCall) -> str:
    return f"{call.name}({json.dumps(dict(call.arguments), ensure_ascii=False)})"
