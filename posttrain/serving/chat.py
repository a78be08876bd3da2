"""A conversation with a served model: one line a turn, the replies as they are sampled."""

from collections.abc import Callable, Iterable
from typing import Any

NEW = "/new"  # a line that begins another conversation


def converse(
    client: Any,
    model: str,
    lines: Iterable[str],
    *,
    write: Callable[[str], None],
    system: str | None = None,
    **sampling: Any,
) -> None:
    """Answer each line until there are no more. A turn that the server refuses is told, and is no part of the
    conversation.

    client: of OpenAI, for the server. write: shows a piece of text. sampling: arguments of a call, such as temperature.
    """
    from openai import APIError

    begin = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, str]] = list(begin)
    for line in lines:
        text = line.strip()
        if text == NEW:
            messages = list(begin)
        if not text or text == NEW:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        said = ""
        try:
            for event in client.chat.completions.create(model=model, messages=asked, stream=True, **sampling):
                piece = (event.choices[0].delta.content or "") if event.choices else ""
                said += piece
                write(piece)
        except APIError as error:
            write(f"[the server refused this turn: {error.message}]\n")
            continue
        write("\n")
        messages = [*asked, {"role": "assistant", "content": said}]
