"""Splits rows into words and hashes their n-grams, for the search for near-duplicates and contamination.

Words are compared in Unicode's compatibility form (NFKC), without case, punctuation and white space. An arithmetic sign
is a word, so that 3 + 4 and 3 * 4 differ. Each Chinese or Japanese character is a word.
Left out: splitting other scripts without spaces; a run of their letters counts as one word.
"""

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
import xxhash

from posttrain.data.labelled import Labelled
from posttrain.data.pairs import Pair
from posttrain.data.transcript import message_text
from posttrain.records import Row

Item = Row | Pair | Labelled
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# A hyphen is a minus sign if no letter or digit precedes it, or if a digit follows it.
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[+*/=<>^%×÷√∑∫≤≥≠−]|(?<!\w)-|-(?=\d)")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no product loses a bit


def words(text: str) -> list[str]:
    """The words of a text in order. A text of punctuation alone is one word; an empty text has none."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found or ([text.strip()] if text.strip() else [])


def ngram_hashes(found: list[str], n: int) -> np.ndarray:
    """The hashes of all runs of `n` words, uint64 [len(found) - n + 1].

    Fewer than `n` words are one run. No words give an empty array.
    """
    n = min(n, len(found))
    if not n:
        return np.zeros(0, np.uint64)
    of_words = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in found], np.uint64)
    count = len(found) - n + 1
    hashes = np.full(count, n, np.uint64)
    for start in range(n):
        hashes = hashes * _BASE + of_words[start : start + count]
    return hashes ^ (hashes >> np.uint64(32))


def item_texts(item: Item) -> Iterator[tuple[str, str]]:
    """(part, text) of each turn except system turns. part: `prompt` or `reply`; for pairs also `chosen`, `rejected`."""
    if isinstance(item, Row):
        turns = item.messages
        replies: tuple[tuple[str, str], ...] = ()
    else:
        turns = item.prompt
        parts = ("chosen", "rejected") if isinstance(item, Pair) else ("reply",)
        replies = tuple(zip(parts, map(message_text, item.replies), strict=True))
    for turn in turns:
        if turn.role != "system":
            yield "reply" if turn.role == "assistant" and isinstance(item, Row) else "prompt", message_text(turn)
    yield from replies
