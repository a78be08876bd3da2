"""Replies as bytes, for the ledger: a JSON head, then the token ids (int32) and log-probabilities (float64).

Exact in both directions, and read without executing anything. A reply whose `finish_reason` is "" goes on.
"""

import json
from array import array
from collections.abc import Sequence

from posttrain.records import VersionSpan
from posttrain.sampling.requests import Completion

_LENGTH_BYTES = 4


def pack(replies: Sequence[Completion]) -> bytes:
    """The replies as bytes."""
    head = [
        [
            len(reply.token_ids),
            [[span.policy_version, span.start, span.end] for span in reply.versions],
            reply.finish_reason,
            reply.text,
        ]
        for reply in replies
    ]
    text = json.dumps(head).encode()
    ids = array("i", [token for reply in replies for token in reply.token_ids])
    logprobs = array("d", [value for reply in replies for value in reply.logprobs])
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + ids.tobytes() + logprobs.tobytes()


def unpack(data: bytes) -> list[Completion]:
    """The inverse of `pack`."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    head = json.loads(data[_LENGTH_BYTES:start])
    total = sum(count for count, *_ in head)
    ids, logprobs = array("i"), array("d")
    ids.frombytes(data[start : start + total * ids.itemsize])
    logprobs.frombytes(data[start + total * ids.itemsize :])
    replies, first = [], 0
    for count, versions, finish_reason, text in head:
        end = first + count
        spans = tuple(VersionSpan(*span) for span in versions)
        replies.append(Completion(tuple(ids[first:end]), text, tuple(logprobs[first:end]), finish_reason, spans))
        first = end
    return replies
