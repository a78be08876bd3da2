"""The messages between a stage and its reward actor: typed records in MessagePack, with many scorings in one message.

The stage encodes rollouts and rows once. The actor passes the bytes on to a reward process, which decodes them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.pool.wire import UNENCODABLE, EncodedPair, encode_pairs, is_plain, plain_row

Pair = tuple[Rollout, Row]


class Scoring(Struct, frozen=True, array_like=True):
    """At least one rollout to score under the caller's key.

    rows: the encoded rows, each once. pairs: for each rollout its encoding and the place of its row in `rows`, or the
    reason why it could not be encoded.
    """

    key: int
    rows: list[Raw]
    pairs: list[tuple[int, Raw] | str]

    def encoded(self) -> Iterator[EncodedPair | str]:
        """The pair of each rollout, or the reason why it has none, as `RewardPool.begin_encoded` takes them."""
        for pair in self.pairs:
            yield pair if isinstance(pair, str) else EncodedPair(pair[1], self.rows[pair[0]])


class Done(Struct, frozen=True, array_like=True):
    """The scores of a scoring, in order. error: a defect in the actor's own code, because of which there are none."""

    key: int
    scores: list[Scored]
    error: str = ""


_encoder = msgspec.msgpack.Encoder()
_scorings = msgspec.msgpack.Decoder(list[Scoring])
_done = msgspec.msgpack.Decoder(list[Done])


def pack_scorings(scorings: Sequence[tuple[int, Sequence[Pair]]]) -> bytes:
    """Encode groups of pairs, each under its key. Consecutive pairs with the same row share it."""
    try:
        return _encoder.encode([_scoring(key, pairs) for key, pairs in scorings])
    except UNENCODABLE:  # each pair is encoded by itself, to find those at fault
        return _encoder.encode([_scoring_of_parts(key, pairs) for key, pairs in scorings])


def _scoring(key: int, pairs: Sequence[Pair]) -> tuple[int, list[Any], list[tuple[int, Rollout]]]:
    """The fields of a `Scoring`, not encoded yet."""
    rows: list[Any] = []
    placed: list[tuple[int, Rollout]] = []
    last = None
    for rollout, row in pairs:
        if row is not last:
            last = row
            rows.append(row if is_plain(row) else plain_row(row))
        placed.append((len(rows) - 1, rollout))
    return key, rows, placed


def _scoring_of_parts(key: int, pairs: Sequence[Pair]) -> Scoring:
    """A `Scoring` in which the reason stands in place of each pair that cannot be encoded."""
    rows: list[Raw] = []
    encoded: list[tuple[int, Raw] | str] = []
    for pair in encode_pairs(pairs):
        if isinstance(pair, str):
            encoded.append(pair)
            continue
        if not rows or pair.row is not rows[-1]:
            rows.append(pair.row)
        encoded.append((len(rows) - 1, pair.rollout))
    return Scoring(key, rows, encoded)


def unpack_scorings(data: bytes) -> list[Scoring]:
    """The inverse of `pack_scorings`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _scorings.decode(data)


def pack_done(done: Iterable[Done]) -> bytes:
    """Encode finished scorings as bytes."""
    return _encoder.encode(list(done))


def unpack_done(data: bytes) -> list[Done]:
    """The inverse of `pack_done`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _done.decode(data)
