"""What a stage and its reward actor say to each other: MessagePack of typed records, many scorings in one message.

Rollouts and rows are encoded once, where they are, and are handed on as they are to the reward process that reads them.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Raw, Struct

from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.pool.wire import EncodedPair, encode_pairs


class Scoring(Struct, frozen=True, array_like=True):
    """Rollouts to score under the caller's key. rows: encoded, each once. pairs: (place in `rows`, encoded rollout) of
    each rollout, or why it could not be encoded."""

    key: int
    rows: list[Raw]
    pairs: list[tuple[int, Raw] | str]

    def encoded(self) -> Iterator[EncodedPair | str]:
        """What the pool is given for each rollout."""
        for pair in self.pairs:
            yield pair if isinstance(pair, str) else EncodedPair(pair[1], self.rows[pair[0]])


class Done(Struct, frozen=True, array_like=True):
    """The scores of a scoring, in order; or `error`, a defect for which there are none."""

    key: int
    scores: list[Scored]
    error: str = ""


_encoder = msgspec.msgpack.Encoder()
_scorings = msgspec.msgpack.Decoder(list[Scoring])
_done = msgspec.msgpack.Decoder(list[Done])


def scoring_of(key: int, pairs: Sequence[tuple[Rollout, Row]]) -> Scoring:
    """The pairs under a key. The rollouts of a group follow each other, so that their row is encoded once."""
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


def pack_scorings(scorings: Iterable[Scoring]) -> bytes:
    """Scorings as bytes."""
    return _encoder.encode(list(scorings))


def unpack_scorings(data: bytes) -> list[Scoring]:
    """The inverse of `pack_scorings`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _scorings.decode(data)


def pack_done(done: Iterable[Done]) -> bytes:
    """Finished scorings as bytes."""
    return _encoder.encode(list(done))


def unpack_done(data: bytes) -> list[Done]:
    """The inverse of `pack_done`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _done.decode(data)
