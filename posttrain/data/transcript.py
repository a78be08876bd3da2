"""Messages as plain text, for a judge, a report or a log. Texts for training are rendered by samples.py."""

import json
from collections.abc import Sequence

from posttrain.records import ImagePart, Message, ToolCall


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as one text, in which each turn begins with its role, such as [user]."""
    return "\n\n".join(f"[{message.role}]\n{message_text(message)}" for message in messages)


def message_text(message: Message) -> str:
    """A turn as text: its content, its images by name, and each tool call as `weather({"city": "Paris"})`."""
    text = message.text
    if not isinstance(message.content, str):
        text = "".join(_image(part) if isinstance(part, ImagePart) else part.text for part in message.content)
    return "\n".join([*([text] if text or not message.tool_calls else []), *map(_call, message.tool_calls)])


def _image(part: ImagePart) -> str:
    return f"[image {part.image}]" if part.image else "[image]"


def _call(call: ToolCall) -> str:
    return f"{call.name}({json.dumps(dict(call.arguments), ensure_ascii=False)})"
