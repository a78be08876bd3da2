"""What travels between the pool and a worker: JSON in frames with a 4-byte length, never pickle.

A reward therefore sees a row as JSON would carry it: tuples in fields are lists, keys are strings. Token ids and
log-probabilities are packed as base64 of machine numbers, since as JSON lists they would cost four times as much;
both ends are on one machine, so byte order is no question.
"""

import base64
import json
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.records import Message, RewardResult, Rollout, Row, VersionSpan

HEADER_BYTES = 4
MAX_REPLY_BYTES = 1 << 20
_PLAIN = ("prompt_id", "group_id", "index", "text", "finish_reason", "system", "worker", "started_s", "finished_s")
_PACKED = {"prompt_ids": "q", "token_ids": "q", "sampler_logprobs": "d"}  # 64-bit integers, 64-bit floats


def frame(message: Mapping[str, Any]) -> bytes:
    """The message as JSON behind its length. Raises TypeError or ValueError where JSON cannot carry it."""
    body = json.dumps(message, default=_plain, separators=(",", ":")).encode("ascii")
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


def pair_to_json(rollout: Rollout, row: Row) -> dict[str, Any]:
    """The pair as JSON values. Raises TypeError or OverflowError where ids are no 64-bit integers."""
    reply = {name: getattr(rollout, name) for name in _PLAIN}
    for name, kind in _PACKED.items():
        reply[name] = base64.b64encode(array(kind, getattr(rollout, name)).tobytes()).decode("ascii")
    reply["versions"] = [(span.policy_version, span.start, span.end) for span in rollout.versions]
    prompt = {
        "id": row.id,
        "capability": row.capability,
        "messages": [(message.role, message.content) for message in row.messages],
        "answer": row.answer,
        "fields": row.fields,
    }
    return {"rollout": reply, "row": prompt}


def pair_from_json(message: Mapping[str, Any]) -> tuple[Rollout, Row]:
    reply, prompt = dict(message["rollout"]), dict(message["row"])
    for name, kind in _PACKED.items():
        numbers = array(kind)
        numbers.frombytes(base64.b64decode(reply[name]))
        reply[name] = tuple(numbers)
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
