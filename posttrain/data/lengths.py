"""How long rows are, and what of them is trained on."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

from posttrain.data.chat import render_conversation, render_prompt
from posttrain.data.pairs import Pair
from posttrain.data.transcript import message_text
from posttrain.data.turns import is_learned, tools_of
from posttrain.records import Message, Row


def character_length(item: Row | Pair) -> int:
    """Characters of all texts of a row, or of a pair with its longer reply."""
    if isinstance(item, Pair):
        return sum(len(message_text(turn)) for turn in item.prompt) + max(len(item.chosen), len(item.rejected))
    return sum(len(message_text(turn)) for turn in item.messages)


def token_length(tokenizer: Any) -> Callable[[Any], int]:
    """Counts the tokens of a row as training or sampling sees it, or of a pair with its longer reply."""

    def count(item: Row | Pair) -> int:
        tools = tools_of(item.fields)
        if isinstance(item, Pair):
            replies = ((*item.prompt, Message("assistant", reply)) for reply in (item.chosen, item.rejected))
            return max(len(render_conversation(tokenizer, turns, tools)[0]) for turns in replies)
        if any(map(is_learned, item.messages)):
            return len(render_conversation(tokenizer, item.messages, tools)[0])
        return len(render_prompt(tokenizer, item.messages, tools))

    return count


def runs(tokenizer: Any, row: Row) -> list[tuple[list[int], bool]]:
    """The token ids of a row, cut where training on them begins or ends: (ids, whether they are trained on)."""
    ids, mask = render_conversation(tokenizer, row.messages, tools_of(row.fields))
    groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [([token for token, _ in group], bool(bit)) for bit, group in groups]
