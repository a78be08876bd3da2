"""Rows that repeat an earlier one, exactly or nearly: of several the first stays.

    row ─► exact: digest of its turns ─────────────────────────► table of rows that stay (SQLite, on disk)
       └─► near: 5-word shingles ─► MinHash ─► keys of bands ──► candidates ─► their shingles ─► Jaccard, computed

Exact duplicates have equal turns, answer, tools and label. Near-duplicates have an equal answer, tools and label too,
and each of their texts (prompt; reply, or chosen and rejected) shares at least `near` of its 5-word shingles, as the
Jaccard index has it. MinHash only proposes candidates, so no row is removed that is less alike. A pair that is exactly
as alike as `near` is proposed with a probability of at least 99%. The permutations have a fixed seed: equal data, equal
result.

Source: Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022 (5-gram shingles, MinHash);
Leskovec et al., "Mining of Massive Datasets", chapter 3 (bands).

The memory does not grow. The index is a temporary file of SQLite, which is deleted in the end. It holds, for each row
that stays, a digest of 16 bytes and the id; with `near` also 8 bytes a word and about 25 bytes for each of the
bands, of which there are 12 at 0.9.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from posttrain.data.messages import messages_to_json
from posttrain.data.ngrams import Item, item_texts, ngram_hashes, words
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
    """A row that repeats another one.

    id: its own. of: the id of the row that stays. similarity: 1 if it is exact, else the Jaccard index of the texts
    that are least alike.
    """

    id: str
    of: str
    similarity: float


def digest(item: Item) -> bytes:
    """16 bytes that are equal for two items with equal turns, answer, tools and label."""
    turns = json.dumps(messages_to_json(item.turns if not isinstance(item, Row) else item.messages), sort_keys=True)
    return hashlib.blake2b(turns.encode() + _apart(item), digest_size=16).digest()


def _apart(item: Item) -> bytes:
    """What makes two items different however alike their texts are."""
    fields: Mapping[str, Any] = item.fields
    marks = [getattr(item, "answer", None), getattr(item, "good", None), fields.get("tools")]
    return hashlib.blake2b(json.dumps(marks, sort_keys=True, default=str).encode(), digest_size=16).digest()


class DuplicateIndex:
    """The rows that stay. near: the least Jaccard index, in (0, 1), of near-duplicates; None finds exact ones only."""

    def __init__(self, near: float | None = None):
        self._near = near
        # An empty name is a private file, which SQLite keeps in memory while it is small and deletes when it is closed.
        self._base = sqlite3.connect("", isolation_level=None)
        for line in (
            "PRAGMA journal_mode=OFF",
            f"PRAGMA cache_size=-{CACHE_KIB}",
            "CREATE TABLE exact (digest BLOB PRIMARY KEY, id TEXT) WITHOUT ROWID",
            "CREATE TABLE kept (number INTEGER PRIMARY KEY, id TEXT, shingles BLOB)",
            "CREATE TABLE bands (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID",
            "BEGIN",
        ):
            self._base.execute(line)
        if near is not None:
            from datasketch import MinHash

            self._band = band_size(near)
            self._empty = MinHash(PERMUTATIONS, seed=SEED, hashfunc=lambda value: value, scheme="affine32")

    def find(self, item: Item) -> Duplicate | None:
        """The row that stays and that `item` repeats; None if there is none, and then `item` stays."""
        code = digest(item)
        found = self._base.execute("SELECT id FROM exact WHERE digest = ?", (code,)).fetchone()
        if found is not None:
            return Duplicate(item.id, found[0], 1.0)
        if self._near is not None and (near := self._find_near(item)) is not None:
            return near
        self._base.execute("INSERT INTO exact VALUES (?, ?)", (code, item.id))
        return None

    def _find_near(self, item: Item) -> Duplicate | None:
        """As `find`, for near-duplicates. A row that stays is put into the tables."""
        shingles = item_shingles(item)
        keys = self._band_keys(shingles, _apart(item))
        places = ", ".join("?" * len(keys))
        near = self._base.execute(
            f"SELECT id, shingles FROM kept JOIN (SELECT number AS candidate FROM bands WHERE key IN ({places}) "
            f"GROUP BY number ORDER BY COUNT(*) DESC, number LIMIT {CANDIDATES}) ON number = candidate",
            keys,
        )
        for identity, blob in near:
            alike = similarity(shingles, np.frombuffer(blob, np.uint64))
            if alike >= (self._near or 0):
                return Duplicate(item.id, identity, alike)
        number = self._base.execute(
            "INSERT INTO kept (id, shingles) VALUES (?, ?)", (item.id, shingles.tobytes())
        ).lastrowid
        self._base.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return None

    def _band_keys(self, shingles: np.ndarray, apart: bytes) -> list[int]:
        """A key for each band of the signature; items that may be near have one in common. Signed, as SQLite's are."""
        signature = self._empty.copy()
        signature.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
        values, size = signature.hashvalues, self._band
        parts = [values[start : start + size].tobytes() for start in range(0, PERMUTATIONS - size + 1, size)]
        keys = [xxhash.xxh3_64_intdigest(apart + part, seed=number) for number, part in enumerate(parts)]
        return [key - (1 << 63) for key in keys]

    def close(self) -> None:
        """Delete the index."""
        self._base.close()

    def __enter__(self) -> "DuplicateIndex":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def band_size(near: float) -> int:
    """The longest band with which a pair that is as alike as `near` misses all bands with at most 1% probability."""
    return max(size for size in range(1, PERMUTATIONS + 1) if (1 - near**size) ** (PERMUTATIONS // size) <= MISSED)


def item_shingles(item: Item) -> np.ndarray:
    """The set of shingles of all texts, sorted uint64; the top two bits say which part they belong to."""
    found = [np.zeros(0, np.uint64)]
    for part, text in item_texts(item):
        mark = np.uint64(_PARTS.index(part) << 62)
        found.append((ngram_hashes(words(text), SHINGLE) >> np.uint64(2)) | mark)
    return np.unique(np.concatenate(found))


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """The Jaccard index of two sets of shingles, for each part by itself; the least of them."""
    bounds = np.arange(1, len(_PARTS), dtype=np.uint64) << np.uint64(62)
    least = 1.0
    parts = (np.split(shingles, np.searchsorted(shingles, bounds)) for shingles in (one, two))
    for a, b in zip(*parts, strict=True):
        if len(a) or len(b):
            shared = len(np.intersect1d(a, b, assume_unique=True))
            least = min(least, shared / (len(a) + len(b) - shared))
    return least
