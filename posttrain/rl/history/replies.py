"""Encode replies as bytes for the ledger, in MessagePack: values come back exactly, and reading cannot run code."""

from collections.abc import Sequence

import msgspec

from posttrain.decoding import named_field
from posttrain.errors import StageError
from posttrain.sampling.rollouts import Reply

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Reply, ...]).decode


def pack(replies: Sequence[Reply]) -> bytes:
    """Encode the replies of a group."""
    return _encode(replies)


def unpack(data: bytes) -> tuple[Reply, ...]:
    """Decode the bytes of `pack`. Raises StageError, which names the field, for any other bytes."""
    try:
        return _decode(data)
    except msgspec.DecodeError as error:
        reason = named_field(error, tuple[Reply, ...]) if isinstance(error, msgspec.ValidationError) else error
        raise StageError(f"the ledger holds replies that cannot be read: {reason}") from None
