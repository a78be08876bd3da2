"""Makes training samples of chats: messages in, token ids and the loss mask out.

Text is rendered as for sampling (chat.py). Of an assistant turn, the model is trained on the tokens that follow the
prompt which sampling would send for that turn. The last of them is the token at which sampling stops (ends.py):
without it the model would not learn to stop. A template with `{% generation %}` marks can exclude a part of these
tokens.

A template may write a turn in another way once other turns follow: Qwen3's template removes the reasoning from earlier
turns. Then a conversation becomes several samples, each of which begins with exactly the prompt that sampling would
send:

    system, user 1, reply 1, user 2, reply 2  ─►  [system, user 1, REPLY 1]
                                                  [system, user 1, reply 1 as rewritten, user 2, REPLY 2]

Left out: truncation, packing, and any repair of a template. If a template cannot produce such samples, this module
raises an error, because otherwise the fault would show only in the loss.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.chat import (
    REMEDY,
    Messages,
    apply_template,
    as_dicts,
    begun_thinking,
    conversation_ids,
    prompt_ids,
    render_prompt,
)
from posttrain.data.ends import end_token_ids
from posttrain.data.messages import TEXT_ROLE, shown
from posttrain.data.shown import Tools, require_tools_shown
from posttrain.data.special import encode_text, guard_of
from posttrain.data.templates import chat_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import is_learned
from posttrain.errors import DataError
from posttrain.records import Message

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN_TOKENS = 4


def render_samples(tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> list[tuple[list[int], list[int]]]:
    """The samples that a conversation becomes: (token ids, mask) of each, two lists of the same length.

    The mask is 1 for a token that is trained on, else 0. It is 1 for the tokens of assistant turns, including tool
    calls and the token that ends the turn, except turns with `trained=False`. Each such turn is trained on in exactly
    one sample, after exactly the tokens that `render_prompt` makes of the messages before it. There is one sample
    unless the template rewrites turns.

    Raises `DataError` if no turn is trained on, if the template refuses the messages or omits tool calls or tool
    results, if it begins a turn with other tokens than sampling would, or if it ends a turn with a token at which
    sampling does not stop.
    """
    dicts = as_dicts(messages)
    if dicts[0]["role"] == TEXT_ROLE:
        return [_plain_text(tokenizer, dicts[0]["content"])]
    learned = learned_turns(messages)
    if not learned:
        raise DataError(
            f"messages have roles {[item['role'] for item in dicts]}, but need an assistant turn to train on"
        )
    turns = {index: _render_turn(tokenizer, dicts[: index + 1], tools) for index in learned}
    ends_learned = learned[-1] == len(dicts) - 1
    whole = turns[learned[-1]].ids if ends_learned else conversation_ids(tokenizer, dicts, tools)
    require_tools_shown(lambda *given: conversation_ids(tokenizer, *given), dicts, tools, ids=whole)
    samples: list[tuple[list[int], list[int]]] = []
    # From the longest rendering to the shortest: a turn is trained on in the first one that holds exactly the tokens
    # that sampling would have seen and produced.
    for ids in (whole, *(turns[index].ids for index in reversed(learned))):
        found = [index for index, turn in turns.items() if ids[: turn.stop] == turn.ids[: turn.stop]]
        if found:
            mask = [0] * len(ids)
            for turn in map(turns.pop, found):
                mask[turn.start : turn.stop] = turn.bits
            samples.insert(0, (ids, mask))
    return samples


def render_conversation(tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> tuple[list[int], list[int]]:
    """The single sample of a conversation, as `render_samples` makes it: (token ids, mask).

    Raises `DataError` if the conversation becomes several samples, and whatever `render_samples` raises.
    """
    samples = render_samples(tokenizer, messages, tools)
    if len(samples) > 1:
        raise DataError(
            f"the conversation becomes {len(samples)} samples: the chat template rewrites earlier turns, so the "
            "conversation up to one of them is not a prefix of the rendered conversation"
        )
    return samples[0]


def render_reply(
    tokenizer: Tokenizer, prompt: Messages, reply: str | Message, *, tools: Tools = None, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as `render_prompt` makes them, and of a reply to it with the token that ends it.

    reply: a text, or an assistant turn, which may call tools. ended: False for a reply that was cut off at the token
    limit; it gets no end token. Raises what `render_samples` raises.
    """
    turn = Message("assistant", reply) if isinstance(reply, str) else reply
    dicts = as_dicts([*prompt, turn])
    if not ended and "</think>" not in turn.text:
        asked = render_prompt(tokenizer, prompt, tools)
        if begun_thinking(tokenizer, asked):  # templates have no form for thinking that does not end
            return asked, encode_text(tokenizer, guard_of(tokenizer, chat_template(tokenizer)), turn.text)
    rendered = _render_turn(tokenizer, dicts, tools)
    require_tools_shown(lambda *given: conversation_ids(tokenizer, *given), dicts, tools, ids=rendered.ids)
    stop = rendered.stop if ended else rendered.stop - 1
    return rendered.ids[: rendered.start], rendered.ids[rendered.start : stop]


def learned_turns(messages: Messages) -> list[int]:
    """Indices of the assistant turns that are trained on: all but those with `trained=False`."""
    return [
        index
        for index, item in enumerate(messages)
        if (is_learned(item) if isinstance(item, Message) else item["role"] == "assistant")
    ]


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn, rendered as the last turn of a conversation.

    ids: token ids of the conversation up to and including this turn. start: index of the first token that sampling
    would produce. stop: index after the token at which sampling stops. bits: the mask of ids[start:stop], 1 for a token
    that is trained on.
    """

    ids: list[int]
    start: int
    stop: int
    bits: list[int]


def _render_turn(tokenizer: Tokenizer, dicts: list[dict[str, Any]], tools: Tools) -> _Turn:
    """Render the last of these messages. Raises `DataError` unless sampling could have produced it."""
    name = f"message {len(dicts) - 1}"
    marked = _GENERATION_MARKER.search(chat_template(tokenizer)) is not None
    prompt = prompt_ids(tokenizer, dicts[:-1], tools)
    content = dicts[-1]["content"]
    if "</think>" in content and "<think>" not in content:  # the prompt opened the block, so the reply lacks the tag
        dicts = [*dicts[:-1], {**dicts[-1], "content": begun_thinking(tokenizer, prompt) + content}]
    rendered = apply_template(tokenizer, dicts, tools=tools, return_assistant_tokens_mask=marked)
    ids = list(rendered["input_ids"])
    _require_prefix(tokenizer, prompt, ids, name=name)
    start, ends = len(prompt), set(end_token_ids(tokenizer))
    last = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
    if last is None:
        raise DataError(_no_end(tokenizer, ids[start:], name))
    if tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).strip():
        raise DataError(
            f"{name}: the chat template goes on with {_shown(tokenizer, ids[last + 1 :])} after "
            f"{_shown(tokenizer, ids[last : last + 1])}, at which sampling stops; {REMEDY}"
        )
    if last == start and content.strip():
        raise DataError(f"{name}: the chat template omits the reply {shown(content)}; {REMEDY}")
    bits = [1] * (last + 1 - start)
    if marked:
        bits = _up_to_the_end([int(bit) for bit in rendered["assistant_masks"][start : last + 1]], name)
    return _Turn(ids, start, last + 1, bits)


def _up_to_the_end(bits: list[int], name: str) -> list[int]:
    """The generation marks of a turn, extended to its end token.

    Some templates close the marked part before the token that ends the turn, but that token belongs to the reply.
    """
    if not any(bits):
        raise DataError(f"{name}: the chat template marks no token of this turn; check its generation markers")
    if not bits[0]:
        raise DataError(
            f"{name}: sampling starts {bits.index(1)} tokens before the first that is trained on; check the generation "
            "markers of the chat template"
        )
    last = len(bits) - 1 - bits[::-1].index(1)
    return [*bits[:last], *[1] * (len(bits) - last)]


def _plain_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(token ids, mask) of a text without turns, followed by the end token. All but the begin token is trained on."""
    ids = encode_text(tokenizer, guard_of(tokenizer, chat_template(tokenizer)), text)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = end_token_ids(tokenizer)[:1]
    return [*start, *ids, *end], [0] * len(start) + [1] * (len(ids) + len(end))


def _require_prefix(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, name: str) -> None:
    """Raise `DataError` unless the conversation begins with the prompt that sampling would send."""
    if ids[: len(prompt)] == prompt:
        return
    pairs = zip(prompt, ids, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(ids)))
    rest = tokenizer.decode(prompt[at:])
    begun = (
        "; the prompt opens a thinking block, so the reply must begin with its thinking, and the template must keep it "
        "(the builtin templates do)"
        if "<think>" in rest
        else ""
    )
    raise DataError(
        f"the prompt before {name} is not a prefix of the rendered conversation: at token {at} it has "
        f"{_shown(tokenizer, prompt[at:])}, the conversation {_shown(tokenizer, ids[at:])}{begun}; {REMEDY}"
    )


def _no_end(tokenizer: Tokenizer, ids: list[int], name: str) -> str:
    """The error text for a turn without a token at which sampling stops."""
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)))) or "none"
    return (
        f"{name}: the last token of the turn is {_shown(tokenizer, ids[-1:])}, at which sampling does not stop, so the "
        f"model would not learn to end a reply; sampling stops at {ends} (eos_token of the tokenizer, eos_token_id in "
        f"generation_config.json or config.json); {REMEDY}"
    )


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return repr(tokenizer.decode(list(ids[:_SHOWN_TOKENS])))
