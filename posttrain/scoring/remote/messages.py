"""The messages between a stage and its reward actor: typed records in MessagePack, with many scorings in one message.

The stage encodes rollouts and rows once. The actor passes the bytes on to a reward process, which decodes them.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Raw, Struct

from posttrain.records import Rollout, Row, Scored
from posttrain.scoring.pool.wire import EncodedPair, encode_pairs


class Scoring(Struct, frozen=True, array_like=True):
    """Rollouts to score under the caller's key. rows: the encoded rows, each once. pairs: for each rollout its encoding
    and the place of its row in `rows`, or the reason why it could not be encoded."""

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


def scoring_of(key: int, pairs: Sequence[tuple[Rollout, Row]]) -> Scoring:
    """Encode pairs under a key. Consecutive rollouts of one group share their row, which is encoded once."""
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
    """Encode scorings as bytes."""
    return _encoder.encode(list(scorings))


def unpack_scorings(data: bytes) -> list[Scoring]:
    """The inverse of `pack_scorings`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _scorings.decode(data)


def pack_done(done: Iterable[Done]) -> bytes:
    """Encode finished scorings as bytes."""
    return _encoder.encode(list(done))


def unpack_done(data: bytes) -> list[Done]:
    """The inverse of `pack_done`. Raises msgspec.DecodeError, which names the field, for anything else."""
    return _done.decode(data)
