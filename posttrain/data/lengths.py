"""How long rows are, and what of them is trained on."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

from posttrain.data.chat import render_prompt
from posttrain.data.ngrams import Item
from posttrain.data.samples import render_reply, render_samples
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.transcript import message_text
from posttrain.data.turns import is_learned, tools_of
from posttrain.records import Row


def character_length(item: Item) -> int:
    """The number of characters in all turns of a row, or in the prompt and the reply (of a pair, the longer reply)."""
    if isinstance(item, Row):
        return sum(len(message_text(turn)) for turn in item.messages)
    return sum(len(message_text(turn)) for turn in item.prompt) + max(
        len(message_text(reply)) for reply in item.replies
    )


def token_length(tokenizer: Tokenizer) -> Callable[[Any], int]:
    """A function that counts the tokens of an item as training or sampling sees it.

    If a row becomes several samples, the longest one counts. Of a pair, the longer reply counts.
    """

    def count(item: Item) -> int:
        tools = tools_of(item.fields)
        if not isinstance(item, Row):
            rendered = (render_reply(tokenizer, item.prompt, reply, tools=tools) for reply in item.replies)
            return max(len(prompt) + len(reply) for prompt, reply in rendered)
        if any(map(is_learned, item.messages)):
            return max(len(ids) for ids, _ in render_samples(tokenizer, item.messages, tools))
        return len(render_prompt(tokenizer, item.messages, tools))

    return count


def runs(tokenizer: Tokenizer, row: Row) -> list[list[tuple[list[int], bool]]]:
    """The token ids of each sample of a row, cut where training on them begins or ends: (ids, whether trained on)."""
    samples = []
    for ids, mask in render_samples(tokenizer, row.messages, tools_of(row.fields)):
        groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        samples.append([([token for token, _ in group], bool(bit)) for bit, group in groups])
    return samples
