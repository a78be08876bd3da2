"""What travels between the pool and a worker: JSON in frames with a 4-byte length, never pickle.

A reward therefore sees a row as JSON would carry it: tuples in fields are lists, keys are strings. Token ids and
log-probabilities are packed as base64 of machine numbers, since as JSON lists they would cost four times as much;
both ends are on one machine, so byte order is no question.
"""

import json
from array import array
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from posttrain.records import Message, RewardResult, Rollout, Row, VersionSpan

HEADER_BYTES = 4
MAX_REPLY_BYTES = 1 << 20
_PLAIN = ("prompt_id", "group_id", "index", "text", "finish_reason", "system", "worker", "started_s", "finished_s")
_plain_values = attrgetter(*_PLAIN)
_PACKED = {"prompt_ids": "q", "token_ids": "q", "sampler_logprobs": "d"}  # 64-bit integers, 64-bit floats


def frame(message: Mapping[str, Any]) -> bytes:
    """The message as JSON behind its length. Raises TypeError or ValueError where JSON cannot carry it."""
    return _framed(_to_json(message))


def request(key: int, pair: str) -> bytes:
    """The frame of a scoring. pair: of `PairText`."""
    return _framed(f'{{"id":{key},{pair}}}')


def _framed(text: str) -> bytes:
    body = text.encode("ascii")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameBuffer:
    """Collects bytes as they come and gives out whole messages. Raises ValueError on what cannot be a message."""

    def __init__(self, max_bytes: int = MAX_REPLY_BYTES):
        self._data = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._data += data
        while len(self._data) >= HEADER_BYTES:
            length = int.from_bytes(self._data[:HEADER_BYTES], "big")
            if length > self._max_bytes:
                raise ValueError(f"a message of {length} bytes; at most {self._max_bytes} are allowed")
            end = HEADER_BYTES + length
            if len(self._data) < end:
                return
            body = bytes(self._data[HEADER_BYTES:end])
            del self._data[:end]
            message = json.loads(body)
            if not isinstance(message, dict):
                raise ValueError(f"a message that is a {type(message).__name__}, not a mapping")
            yield message


class PairText:
    """Pairs as the members `rollout` and `row` of a JSON object. A row that comes again and again is written once."""

    def __init__(self) -> None:
        self._row: Row | None = None
        self._row_text = ""

    def __call__(self, rollout: Rollout, row: Row) -> str:
        """Raises TypeError, ValueError or OverflowError where JSON cannot carry it or ids are no 64-bit integers."""
        if row is not self._row:
            self._row_text, self._row = _row_text(row), row
        reply: dict[str, Any] = dict(zip(_PLAIN, _plain_values(rollout), strict=True))
        for name, kind in _PACKED.items():
            reply[name] = b2a_base64(array(kind, getattr(rollout, name)), newline=False).decode("ascii")
        reply["versions"] = [(span.policy_version, span.start, span.end) for span in rollout.versions]
        return f'"rollout":{_to_json(reply)},"row":{self._row_text}'


def _row_text(row: Row) -> str:
    messages = [(message.role, message.content) for message in row.messages]
    return _to_json(
        {"id": row.id, "capability": row.capability, "messages": messages, "answer": row.answer, "fields": row.fields}
    )


def pair_from_json(message: Mapping[str, Any]) -> tuple[Rollout, Row]:
    """The pair of a message, which must not be used again."""
    reply, prompt = message["rollout"], message["row"]
    for name, kind in _PACKED.items():
        reply[name] = tuple(array(kind, a2b_base64(reply[name])))
    reply["versions"] = tuple(VersionSpan(*span) for span in reply["versions"])
    prompt["messages"] = tuple(Message(*turn) for turn in prompt["messages"])
    return Rollout(**reply), Row(**prompt)


def result_to_json(result: RewardResult) -> dict[str, Any]:
    return {"value": result.value, "parts": dict(result.parts), "reason": result.reason}


def result_from_json(message: Mapping[str, Any]) -> RewardResult:
    return RewardResult(float(message["value"]), dict(message["parts"]), str(message["reason"]))


def _plain(value: Any) -> Any:
    """JSON for the few other types that rows hold: mappings, NumPy values, dates."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} cannot be sent to a reward process")


_to_json = json.JSONEncoder(default=_plain, separators=(",", ":")).encode
