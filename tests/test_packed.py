"""Requests and pieces on their way between two processes, without an engine."""

import pickle
from typing import Any

import pytest

from posttrain.records import FinishReason, VersionSpan
from posttrain.sampling.packed import Pieces, Requests
from posttrain.sampling.requests import Piece, SampleRequest

REQUESTS = [
    (7, SampleRequest((5, 6), n=3, temperature=0.5, stop_token_ids=(2,), stop=("end",), pictures=("store#a",))),
    (2**48 + 1, SampleRequest((1,), choice_ids=(3, 4), begun=((8, 9), ()), priority=-1)),
]
PIECES = [
    Piece(2**48 + 1, 1, 4, (5, 6), (-0.1, float("-inf")), (VersionSpan(3, 4, 5), VersionSpan(4, 5, 6))),
    Piece(7, 0, 0, (3,), (-1.5,), (VersionSpan(0, 0, 1),), FinishReason.STOP, "é", {3: -1.5, 4: -0.25}, 12),
]


@pytest.mark.parametrize("packed", [Requests(REQUESTS), Pieces(PIECES), Pieces()])
def test_another_process_gets_a_plain_list_of_the_same_records(packed: list[Any]) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        arrived = pickle.loads(pickle.dumps(packed, protocol))
        assert type(arrived) is list
        assert arrived == packed
        assert [type(item) for item in arrived] == [type(item) for item in packed]
