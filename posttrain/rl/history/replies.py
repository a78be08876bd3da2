"""Replies as bytes, for the ledger: MessagePack, exact in both directions, read without executing anything."""

from collections.abc import Sequence

import msgspec

from posttrain.decoding import named_field
from posttrain.errors import StageError
from posttrain.sampling.rollouts import Reply

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Reply, ...]).decode


def pack(replies: Sequence[Reply]) -> bytes:
    """The replies of a group as bytes."""
    return _encode(replies)


def unpack(data: bytes) -> tuple[Reply, ...]:
    """The replies that `pack` wrote. Raises StageError, which names the field, for anything else."""
    try:
        return _decode(data)
    except msgspec.DecodeError as error:
        reason = named_field(error, tuple[Reply, ...]) if isinstance(error, msgspec.ValidationError) else error
        raise StageError(f"the ledger holds replies that cannot be read: {reason}") from None
