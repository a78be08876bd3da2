"""Renders chats for every stage: messages in, token ids and the loss mask out.

Text is rendered by the tokenizer's own chat template. The mask comes from the template's `{% generation %}` markers. If
a template has none, the conversation is rendered prefix by prefix, and each prefix is checked to be a beginning of the
next. The token that ends a turn is trained on too: otherwise the model would not learn to stop. A template that leaves
out tool calls or tool results is refused. Special tokens in the texts of a row are encoded as text (special.py).

Left out: truncation and packing, and any repair of a template. A template that renders a prompt one way for sampling
and another way for training raises an error here, where it would otherwise show only in the loss.

`tokenizer` is any Hugging Face tokenizer with a chat template (`PreTrainedTokenizerBase`); this module imports none.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.data.messages import TEXT_ROLE, tool_call_to_json
from posttrain.data.special import apply_guarded, encode_text, guard_of, special_token_problem
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import is_learned
from posttrain.errors import CheckpointError, DataError
from posttrain.records import Message, Row

Messages = Sequence[Message | Mapping[str, object]]
Tools = Sequence[Mapping[str, object]] | None

# Tokens that end a turn in common chat formats, beside the tokenizer's own end-of-sequence token.
END_OF_TURN_TOKENS = ("<|eot|>", "<|eom|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


def chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template; raises `CheckpointError` if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise CheckpointError(
            f"{name}: the tokenizer has no chat template; put a chat_template.jinja into the folder that "
            "`model.path` names, or point `model.path` at an instruction-tuned checkpoint"
        )
    return template


def end_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end a turn: end-of-sequence first, then those of `END_OF_TURN_TOKENS` it knows."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for token in END_OF_TURN_TOKENS:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
            continue
        if token_id not in ids:
            ids.append(int(token_id))
    return ids


def render_prompt(tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids of a prompt, up to and including the header of the assistant turn that is to come.

    tools: the schemas that the row declares. Raises `DataError` if the template refuses the messages or leaves out
    calls or results of tools, `CheckpointError` if there is no template.
    """
    dicts = as_dicts(messages)
    ids = _prompt_ids(tokenizer, dicts, tools)
    _require_tools_shown(tokenizer, dicts, tools, ids=ids, add_generation_prompt=True)
    return ids


def render_row(render: Callable[[Sequence[Message]], Sequence[int]], row: Row) -> tuple[int, ...]:
    """Token ids of a row as a prompt, by `render_prompt` of some tokenizer; a `DataError` names the row."""
    try:
        return tuple(render(row.messages))
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


def render_conversation(tokenizer: Any, messages: Messages, tools: Tools = None) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and for each id 1 if it is trained on, else 0.

    Trained on are the tokens of assistant turns, calls of tools among them, with the token that ends each; not the
    turns with `trained=False`. Raises `DataError` if no turn is trained on, if the template refuses the messages or
    leaves out calls or results of tools, or if it marks no generation and its prefixes disagree.
    """
    dicts = as_dicts(messages)
    if dicts[0]["role"] == TEXT_ROLE:
        return _plain_text(tokenizer, dicts[0]["content"])
    learned = learned_turns(messages)
    if not learned:
        raise DataError(
            f"messages have roles {[item['role'] for item in dicts]}, but need an assistant turn to train on"
        )
    marked = _GENERATION_MARKER.search(chat_template(tokenizer)) is not None
    rendered = _apply(tokenizer, dicts, tools=tools, return_assistant_tokens_mask=marked)
    ids = list(rendered["input_ids"])
    _require_tools_shown(tokenizer, dicts, tools, ids=ids)
    all_learned = len(learned) == sum(item["role"] == "assistant" for item in dicts)
    ends = set(end_token_ids(tokenizer))
    if marked:
        mask = _with_end_of_turn(ids, [int(bit) for bit in rendered["assistant_masks"]], ends)
        mask = mask if all_learned else _within(mask, _turn_spans(tokenizer, dicts, tools, ids=ids, turns=learned))
    else:
        spans = _turn_spans(tokenizer, dicts, tools, ids=ids, turns=learned)
        mask = _within([1] * len(ids), [_up_to_end_of_turn(ids, span, ends) for span in spans])
    if not any(mask):
        raise DataError("the chat template marks no token of the assistant turns; check its generation markers")
    return ids, mask


def learned_turns(messages: Messages) -> list[int]:
    """Indices of the assistant turns that are trained on. A turn may say otherwise by `trained=False`."""
    return [
        index
        for index, item in enumerate(messages)
        if (is_learned(item) if isinstance(item, Message) else item["role"] == "assistant")
    ]


def check_parity(tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> None:
    """Raise `DataError` unless what is trained on follows exactly the prompt that sampling would send.

    For every assistant turn that is trained on, `render_prompt` of what comes before it must equal, token for token,
    the beginning of `render_conversation`, and training on that turn must start right there.
    """
    ids, mask = render_conversation(tokenizer, messages, tools)
    dicts = as_dicts(messages)
    if dicts[0]["role"] == TEXT_ROLE:
        return
    for index in learned_turns(messages):
        prompt = _prompt_ids(tokenizer, dicts[:index], tools)
        _require_prefix(tokenizer, prompt, ids, what=f"the prompt before message {index}")
        start = len(prompt)
        if start >= len(mask) or not mask[start] or mask[start - 1]:
            raise DataError(
                f"message {index}: sampling starts at token {start}, but the tokens trained on do not; "
                "check the generation markers of the chat template"
            )


def _plain_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A text without turns, with the token that ends a text; all but the token that begins one is trained on."""
    ids = encode_text(tokenizer, guard_of(tokenizer, chat_template(tokenizer)), text)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = end_token_ids(tokenizer)[:1]
    return [*start, *ids, *end], [0] * len(start) + [1] * (len(ids) + len(end))


def _prompt_ids(tokenizer: Any, dicts: list[dict[str, Any]], tools: Tools) -> list[int]:
    return list(_apply(tokenizer, dicts, tools=tools, add_generation_prompt=True)["input_ids"])


def _apply(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
    from jinja2.exceptions import TemplateError

    guard = guard_of(tokenizer, chat_template(tokenizer))
    try:
        if guard.found_in(messages, options.get("tools")) is not None:
            return apply_guarded(tokenizer, guard, messages, **options)
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        roles = [item.get("role") for item in messages]
        raise DataError(f"the chat template refuses messages with roles {roles}: {error}") from None


def _require_tools_shown(
    tokenizer: Any, dicts: list[dict[str, Any]], tools: Tools, *, ids: list[int], **options: Any
) -> None:
    """Raise `DataError` if the template leaves out a call, a result or the declared tools: many templates drop what
    they do not know, and the model would learn to answer from results that it never sees.

    Each is changed in turn and rendered again: if the token ids stay the same, the template does not show it.
    """
    variants = [(where, variant, tools) for where, variant in _tool_variants(dicts)]
    if tools:
        variants.append(("the row's `tools`", dicts, None))
    for where, variant, shown_tools in variants:
        try:
            same = list(_apply(tokenizer, variant, tools=shown_tools, **options)["input_ids"]) == ids
        except DataError:  # the template refuses the changed conversation, so it does read this part
            continue
        if same:
            raise DataError(
                f"the chat template leaves out {where}; use a chat template that shows tools, or remove the row"
            )


def _tool_variants(dicts: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each part that has to do with a tool: its name, and the conversation with only this part changed."""
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


def _turn_spans(
    tokenizer: Any, dicts: list[dict[str, Any]], tools: Tools, *, ids: list[int], turns: Sequence[int]
) -> list[tuple[int, int]]:
    """(start, end) in `ids` of each of these turns: the tokens that the turn adds to the prompt rendered before it."""
    spans: list[tuple[int, int]] = []
    for index in turns:
        prompt = _prompt_ids(tokenizer, dicts[:index], tools)
        through = list(_apply(tokenizer, dicts[: index + 1], tools=tools)["input_ids"])
        _require_prefix(tokenizer, prompt, ids, what=f"the prompt before message {index}")
        _require_prefix(tokenizer, through, ids, what=f"the conversation up to message {index}")
        spans.append((len(prompt), len(through)))
    return spans


def _up_to_end_of_turn(ids: list[int], span: tuple[int, int], ends: set[int]) -> tuple[int, int]:
    """The span cut after the token that ends the turn.

    What some templates add after it, such as a newline, is not the model's.
    """
    start, stop = span
    last = next((at for at in range(stop - 1, start - 1, -1) if ids[at] in ends), stop - 1)
    return start, last + 1


def _within(mask: list[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The mask with 0 outside of the spans."""
    kept = [0] * len(mask)
    for start, stop in spans:
        kept[start:stop] = mask[start:stop]
    return kept


def _with_end_of_turn(ids: list[int], mask: list[int], ends: set[int]) -> list[int]:
    """The mask with the end-of-turn token included: some templates close the marker before it, but it belongs to
    the reply.
    """
    return [
        1 if bit or (at and mask[at - 1] and token in ends and ids[at - 1] not in ends) else 0
        for at, (token, bit) in enumerate(zip(ids, mask, strict=True))
    ]


def _require_prefix(tokenizer: Tokenizer, prefix: list[int], ids: list[int], *, what: str) -> None:
    if ids[: len(prefix)] == prefix:
        return
    pairs = zip(prefix, ids, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(prefix), len(ids)))
    expected, got = tokenizer.decode(prefix[at : at + 4]), tokenizer.decode(ids[at : at + 4])
    raise DataError(
        f"{what} is not a prefix of the rendered conversation: at token {at} it has {expected!r}, the conversation "
        f"{got!r}; the chat template must render a turn the same way whether or not more turns follow; a template that "
        "rewrites earlier turns (some remove their reasoning) needs train: false on these"
    )
