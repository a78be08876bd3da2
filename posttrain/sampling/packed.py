"""Requests and pieces on their way between a worker and its engine: lists that are sent as MessagePack.

Ray would pickle each record by itself, which takes ten times as long. The other process gets a plain list.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from posttrain.sampling.requests import Piece, SampleRequest

_encode = msgspec.msgpack.Encoder().encode
_requests = msgspec.msgpack.Decoder(list[tuple[int, SampleRequest]]).decode
_pieces = msgspec.msgpack.Decoder(list[Piece]).decode


class Requests(list[tuple[int, SampleRequest]]):
    """Requests with their keys, for `EngineActor.submit`."""

    def __reduce__(self) -> tuple[Callable[[bytes], list[tuple[int, SampleRequest]]], tuple[bytes]]:
        return _unpack_requests, (_encode(list(self)),)


class Pieces(list[Piece]):
    """Pieces of replies, from `EngineActor.collect`."""

    def __reduce__(self) -> tuple[Callable[[bytes], list[Piece]], tuple[bytes]]:
        return _unpack_pieces, (_encode(list(self)),)


def _unpack_requests(data: bytes) -> list[Any]:
    return _requests(data)


def _unpack_pieces(data: bytes) -> list[Piece]:
    return _pieces(data)
