"""The words of a row and hashes of their n-grams, by which near-duplicates and overlaps are found.

Words are compared after Unicode's compatibility form (NFKC), without case, punctuation and white space. Signs of
arithmetic are words, so that 3 + 4 and 3 * 4 differ; so is each character of Chinese and Japanese.
Left out: words of scripts without spaces other than these two, which are compared as whole runs of letters.
"""

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
import xxhash

from posttrain.data.pairs import Labelled, Pair
from posttrain.data.transcript import message_text
from posttrain.records import Row

Item = Row | Pair | Labelled
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# A hyphen is a minus where no letter stands before it, or a digit behind it.
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[+*/=<>^%×÷√∑∫≤≥≠−]|(?<!\w)-|-(?=\d)")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no product loses a bit


def words(text: str) -> list[str]:
    """The words of a text in order; a text without any is one word as it stands."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found or ([text.strip()] if text.strip() else [])


def ngram_hashes(found: list[str], n: int) -> np.ndarray:
    """The hashes of all runs of `n` words, uint64 [max(words - n + 1, 1)]; fewer words than n are one run."""
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
    """(part, text) of each turn: prompt and reply, of a pair prompt, chosen and rejected. System turns are left out."""
    if isinstance(item, Row):
        turns = item.messages
        replies: tuple[tuple[str, str], ...] = ()
    else:
        turns = item.prompt
        pair = isinstance(item, Pair)
        replies = (("chosen", item.chosen), ("rejected", item.rejected)) if pair else (("reply", item.reply),)
    for turn in turns:
        if turn.role != "system":
            yield "reply" if turn.role == "assistant" and isinstance(item, Row) else "prompt", message_text(turn)
    yield from replies
