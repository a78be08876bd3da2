"""Renders chats for every stage: messages in, the token ids of a prompt or a whole conversation out.

Text is rendered by the tokenizer's chat template (templates.py). Special tokens in the texts of a row are encoded as
text (special.py). A template that omits tool calls or tool results is refused (shown.py).

Left out: what a model is trained on (samples.py). `tokenizer` is any Hugging Face tokenizer with a chat template
(`PreTrainedTokenizerBase`); this module imports none.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.data.messages import tool_call_to_json
from posttrain.data.shown import Tools, require_tools_shown
from posttrain.data.special import apply_guarded, guard_of, special_token_problem
from posttrain.data.templates import chat_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import DataError
from posttrain.records import Message, Row

Messages = Sequence[Message | Mapping[str, object]]

REMEDY = (
    "set another chat template beside the model's path (chat_template: {path: FILE} or {builtin: NAME}) or its "
    "arguments (chat_template: {arguments: {enable_thinking: false}}), or edit chat_template.jinja in the model folder"
)

_BEGUN_THINKING = re.compile(r"<think>\s*\Z")


def as_dicts(messages: Messages) -> list[dict[str, Any]]:
    """The messages in the form that chat templates take. Raises `DataError` for an image."""
    return [_as_dict(item) if isinstance(item, Message) else dict(item) for item in messages]


def _as_dict(message: Message) -> dict[str, Any]:
    if not isinstance(message.content, str):
        raise DataError("a message has an image: only text can be rendered")
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    # Templates ask whether a key exists, so a key without a value must not be there.
    if message.tool_calls:
        record["tool_calls"] = [tool_call_to_json(call) for call in message.tool_calls]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return {**record, **{key: value for key, value in optional.items() if value is not None}}


def render_prompt(tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids of a prompt, up to and including the header of the next assistant turn.

    tools: the function schemas that the row declares. Raises `DataError` if the template refuses the messages or omits
    tool calls or tool results, `CheckpointError` if there is no template.
    """
    dicts = as_dicts(messages)
    ids = prompt_ids(tokenizer, dicts, tools)
    require_tools_shown(lambda *given: prompt_ids(tokenizer, *given), dicts, tools, ids=ids)
    return ids


RenderRow = Callable[[Row, Sequence[Message]], Sequence[int]]  # messages as a prompt, with the tools of the row


def render_row(render: RenderRow, row: Row) -> tuple[int, ...]:
    """Token ids of a row as a prompt. Raises `DataError` that names the row."""
    try:
        return tuple(render(row, row.messages))
    except DataError as error:
        raise DataError(f"row {row.id!r}: {error}") from None


def check_special_tokens(tokenizer: Tokenizer, data: DataConfig, rows: Iterable[tuple[str, Messages, Tools]]) -> None:
    """Raise `DataError` for a special token in the text of a row, if `data.special_tokens_in_text` refuses it.

    rows: (name of the row for the error, its messages, its tools) of each row.
    """
    if data.special_tokens_in_text == "encode":
        return
    guard = guard_of(tokenizer, chat_template(tokenizer))
    for name, messages, tools in rows:
        if (token := guard.found_in(as_dicts(messages), tools)) is not None:
            raise DataError(special_token_problem(name, token))


def begun_thinking(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The opening tag with which a prompt ends if it opens a thinking block, such as "<think>\n"; else ""."""
    found = _BEGUN_THINKING.search(tokenizer.decode(prompt))
    return found[0] if found else ""


def prompt_ids(tokenizer: Tokenizer, dicts: list[dict[str, Any]], tools: Tools) -> list[int]:
    """As `render_prompt`, of messages as `as_dicts` makes them, without the check that tools are shown."""
    return list(apply_template(tokenizer, dicts, tools=tools, add_generation_prompt=True)["input_ids"])


def conversation_ids(tokenizer: Tokenizer, dicts: list[dict[str, Any]], tools: Tools) -> list[int]:
    """Token ids of a conversation as the chat template writes it, with nothing begun after its last turn."""
    return list(apply_template(tokenizer, dicts, tools=tools)["input_ids"])


def prompt_text(tokenizer: Tokenizer, dicts: list[dict[str, Any]], tools: Tools) -> str:
    """The text of which `prompt_ids` gives the token ids, where no special token in it is text of the messages."""
    with _refusals(dicts):
        return tokenizer.apply_chat_template(dicts, tools=tools, tokenize=False, add_generation_prompt=True)


def apply_template(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
    """What the tokenizer makes of messages, as a mapping with `input_ids`; special tokens in them are encoded as text.

    options: of `apply_chat_template`. Raises `DataError` if the template refuses the messages.
    """
    guard = guard_of(tokenizer, chat_template(tokenizer))
    with _refusals(messages):
        if guard.found_in(messages, options.get("tools")) is not None:
            return apply_guarded(tokenizer, guard, messages, **options)
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


@contextmanager
def _refusals(messages: list[dict[str, Any]]) -> Iterator[None]:
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        roles = [item.get("role") for item in messages]
        raise DataError(f"the chat template refuses messages with roles {roles}: {error}; {REMEDY}") from None
