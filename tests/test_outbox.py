"""What waits for the pieces of an engine, without an engine."""

import asyncio
from typing import Any

import pytest

from posttrain.records import FinishReason
from posttrain.sampling.requests import Piece
from posttrain.sampling.stream import Outbox, Reply


def test_a_piece_is_given_at_once_if_none_is_to_follow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.sampling.stream.GATHER_S", 1000.0)
    piece = Piece(1, 0, 0, (), (), (), FinishReason.STOP, "")

    async def given(outbox: Outbox) -> Any:
        outbox.add_piece(piece)
        await asyncio.wait_for(outbox.wait(1000.0), 60.0)
        return outbox.take(lambda ids: "")

    outbox = Outbox(16, lambda output: None)
    assert asyncio.run(given(outbox)) == [piece]
    outbox.admit(Reply(outbox, 2, 0, request_id="grows"))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(given(outbox), 0.2))
