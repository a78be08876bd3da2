"""Finds rows that repeat an earlier row, exactly or nearly. The first of several is kept.

    row ─► exact: digest of its turns ─────────────────────────► table of kept rows (SQLite, on disk)
       └─► near: 5-word shingles ─► MinHash ─► keys of bands ──► candidates ─► their shingles ─► Jaccard, computed

Exact duplicates have equal turns, answer, tools, label and pictures. Near-duplicates also have an equal answer, tools,
label and pictures, and the Jaccard index of the 5-word shingles is at least `near` for each of their texts (prompt and
reply, or prompt, chosen and rejected). MinHash only proposes candidates, whose Jaccard index is then computed, so no
row below `near` is removed. Two rows with a Jaccard index of exactly `near` become candidates with a probability of at
least 99%. The MinHash permutations have a fixed seed, so equal data give an equal result.

Source: Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022 (5-gram shingles, MinHash);
Leskovec et al., "Mining of Massive Datasets", chapter 3 (bands).

Memory does not grow with the number of rows. The index is a temporary SQLite file that is deleted at the end. For each
kept row it holds a digest of 16 bytes and the id; with `near` also 8 bytes a word and about 25 bytes a band (12 bands
at 0.9).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from posttrain.data.images.render import pictures_of
from posttrain.data.images.take import COLUMNS
from posttrain.data.messages import messages_to_json
from posttrain.data.ngrams import Item, item_texts, ngram_hashes, words
from posttrain.data.tables import temporary_base
from posttrain.records import Row

SHINGLE = 5
PERMUTATIONS = 128
SEED = 1
MISSED = 0.01
CANDIDATES = 100
CACHE_KIB = 65_536
_PARTS = ("prompt", "reply", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row that repeats an earlier one.

    id: of this row. of: the id of the earlier row, which is kept. similarity: 1 for an exact duplicate, else the lowest
    Jaccard index among the texts of the two rows, in [near, 1].
    """

    id: str
    of: str
    similarity: float


def digest(item: Item) -> bytes:
    """16 bytes that are equal for two items with equal turns, answer, tools, label and pictures."""
    turns = json.dumps(messages_to_json(item.turns if not isinstance(item, Row) else item.messages), sort_keys=True)
    return hashlib.blake2b(turns.encode() + _apart(item), digest_size=16).digest()


def _apart(item: Item) -> bytes:
    """Answer, tools, label and pictures as bytes. Two items with different ones are never duplicates, whatever their
    texts. Pictures are compared by their keys, or where none were taken by what the row names."""
    fields: Mapping[str, Any] = item.fields
    marks = [getattr(item, "answer", None), getattr(item, "good", None), fields.get("tools")]
    marks += [pictures_of(item.messages if isinstance(item, Row) else item.prompt), *map(fields.get, COLUMNS)]
    return hashlib.blake2b(json.dumps(marks, sort_keys=True, default=str).encode(), digest_size=16).digest()


class DuplicateIndex:
    """The kept rows. near: the lowest Jaccard index, in (0, 1), of near-duplicates; None finds only exact ones.

    num_unsettled: rows that had more candidates than they were compared with, none of which they repeat. Each may be a
    near-duplicate that was missed.
    """

    def __init__(self, near: float | None = None):
        self._near = near
        self.num_unsettled = 0
        self._base = temporary_base(
            "CREATE TABLE exact (digest BLOB PRIMARY KEY, id TEXT) WITHOUT ROWID",
            "CREATE TABLE kept (number INTEGER PRIMARY KEY, id TEXT, shingles BLOB)",
            "CREATE TABLE bands (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID",
            cache_kib=CACHE_KIB,
        )
        if near is not None:
            from datasketch import MinHash

            self._band = band_size(near)
            self._empty = MinHash(PERMUTATIONS, seed=SEED, hashfunc=lambda value: value, scheme="affine32")

    def find(self, item: Item) -> Duplicate | None:
        """The kept row that `item` repeats. None if there is none; then `item` is added to the kept rows."""
        code = digest(item)
        found = self._base.execute("SELECT id FROM exact WHERE digest = ?", (code,)).fetchone()
        if found is not None:
            return Duplicate(item.id, found[0], 1.0)
        if self._near is not None and (near := self._find_near(item)) is not None:
            return near
        self._base.execute("INSERT INTO exact VALUES (?, ?)", (code, item.id))
        return None

    def _find_near(self, item: Item) -> Duplicate | None:
        """As `find`, for near-duplicates."""
        shingles = item_shingles(item)
        keys = self._band_keys(shingles, _apart(item))
        places = ", ".join("?" * len(keys))
        near = self._base.execute(
            f"SELECT id, shingles FROM kept JOIN (SELECT number AS candidate FROM bands WHERE key IN ({places}) "
            f"GROUP BY number ORDER BY COUNT(*) DESC, number LIMIT {CANDIDATES + 1}) ON number = candidate",
            keys,
        )
        for compared, (identity, blob) in enumerate(near):
            if compared == CANDIDATES:
                self.num_unsettled += 1
                break
            alike = similarity(shingles, np.frombuffer(blob, np.uint64))
            if alike >= (self._near or 0):
                return Duplicate(item.id, identity, alike)
        number = self._base.execute(
            "INSERT INTO kept (id, shingles) VALUES (?, ?)", (item.id, shingles.tobytes())
        ).lastrowid
        self._base.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return None

    def _band_keys(self, shingles: np.ndarray, apart: bytes) -> list[int]:
        """One key for each band of the MinHash signature. Two near-duplicates most likely share a key.

        The keys are signed 64-bit integers, because SQLite has no unsigned ones.
        """
        signature = self._empty.copy()
        signature.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
        values, size = signature.hashvalues, self._band
        parts = [values[start : start + size].tobytes() for start in range(0, PERMUTATIONS - size + 1, size)]
        keys = [xxhash.xxh3_64_intdigest(apart + part, seed=number) for number, part in enumerate(parts)]
        return [key - (1 << 63) for key in keys]

    def unsettled_text(self) -> str:
        """A sentence about the rows that may repeat another one without being found; "" if there are none."""
        if not self.num_unsettled:
            return ""
        return (
            f"{self.num_unsettled} of the kept rows resemble more than {CANDIDATES} others, of which the {CANDIDATES} "
            "likeliest were compared; near-duplicates among them may have been missed"
        )

    def close(self) -> None:
        """Delete the index."""
        self._base.close()

    def __enter__(self) -> "DuplicateIndex":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def band_size(near: float) -> int:
    """The most permutations a band may have so that two rows with a Jaccard index of `near` share no band with a
    probability of at most 1%.
    """
    return max(size for size in range(1, PERMUTATIONS + 1) if (1 - near**size) ** (PERMUTATIONS // size) <= MISSED)


def item_shingles(item: Item) -> np.ndarray:
    """The shingles of all texts of a row: distinct, sorted, uint64 [shingles]. The top two bits say which text."""
    found = [np.zeros(0, np.uint64)]
    for part, text in item_texts(item):
        mark = np.uint64(_PARTS.index(part) << 62)
        found.append((ngram_hashes(words(text), SHINGLE) >> np.uint64(2)) | mark)
    return np.unique(np.concatenate(found))


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """The Jaccard index of two rows' shingles, computed for each text (prompt, reply, ...); the lowest is returned."""
    bounds = np.arange(1, len(_PARTS), dtype=np.uint64) << np.uint64(62)
    least = 1.0
    parts = (np.split(shingles, np.searchsorted(shingles, bounds)) for shingles in (one, two))
    for a, b in zip(*parts, strict=True):
        if len(a) or len(b):
            shared = len(np.intersect1d(a, b, assume_unique=True))
            least = min(least, shared / (len(a) + len(b) - shared))
    return least
