"""How long rows are, and what of them is trained on."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

from posttrain.data.chat import render_prompt
from posttrain.data.images.render import Pictures, expanded, for_template, pictures_of, row_samples
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


def token_length(tokenizer: Tokenizer, pictures: Pictures | None = None) -> Callable[[Any], int]:
    """A function that counts the tokens of an item as training or sampling sees it, with those of its pictures.

    If a row becomes several samples, the longest one counts. Of a pair, the longer reply counts. pictures: those of the
    items; None counts text only, and pictures raise DataError.
    """

    def count(item: Item) -> int:
        tools = tools_of(item.fields)
        if isinstance(item, Row) and any(map(is_learned, item.messages)):
            return max(len(sample.ids) for sample in row_samples(tokenizer, item, pictures))
        turns = item.messages if isinstance(item, Row) else item.prompt
        keys = pictures_of(turns)
        shown = turns if pictures is None else for_template(turns)
        if isinstance(item, Row):
            prompt, replies = render_prompt(tokenizer, shown, tools), [0]
        else:
            rendered = [render_reply(tokenizer, shown, reply, tools=tools) for reply in item.replies]
            prompt, replies = rendered[0][0], [len(reply) for _, reply in rendered]
        return len(expanded(prompt, keys, pictures) if pictures is not None and keys else prompt) + max(replies)

    return count


def runs(tokenizer: Tokenizer, row: Row) -> list[list[tuple[list[int], bool]]]:
    """The token ids of each sample of a row, cut where training on them begins or ends: (ids, whether trained on)."""
    samples = []
    for ids, mask in render_samples(tokenizer, row.messages, tools_of(row.fields)):
        groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        samples.append([([token for token, _ in group], bool(bit)) for bit, group in groups])
    return samples
