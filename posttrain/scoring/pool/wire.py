"""The messages between a pool and its reward processes: typed records in MessagePack, each in a frame with its length.

    pool ── Setup ───► reward process      loads the reward function
         ◄── Loaded ──                     or why it could not
         ── Question ─► reward process     one rollout and its row
         ◄── Answer ──                     its result, or why there is none

Nothing is pickled. A message that is not one of these records is refused with the name of the wrong field. The reward
gets a row as if it came from JSON: in `fields` and `answer` tuples have become lists, keys text, NumPy values numbers
and lists, and dates text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from posttrain.records import RewardResult, Rollout, Row

UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)  # raised for a value that MessagePack lacks
MARK = "POSTTRAIN_REWARD_WORKER"  # the variable by which everything is found that such a process starts
HEADER_BYTES = 4
MAX_REPLY_BYTES = 1 << 20
T = TypeVar("T")


class Setup(Struct, frozen=True):
    """Tells a reward process what to load. target: the fields of a `plugins.target.Target`. args: for the reward."""

    target: dict[str, Any]
    args: dict[str, Any]
    timeout_s: float
    memory_gib: float | None


class Question(Struct, frozen=True):
    """One rollout to score. key: the pool's name for it, which comes back with the answer."""

    key: int
    rollout: Rollout
    row: Row


class _EncodedQuestion(Struct, frozen=True):
    """A `Question` whose parts are encoded already, so that the row of a group is encoded once for all its rollouts."""

    key: int
    rollout: msgspec.Raw
    row: msgspec.Raw


class Loaded(Struct, frozen=True, tag="loaded"):
    """Says that the function is loaded, or in `failed` why not. is_async: whether it is a coroutine function."""

    is_async: bool = False
    failed: str = ""


class Answer(Struct, frozen=True, tag="answer"):
    """The answer to a question: a result, an error, or a missed deadline. seconds: time spent in the function."""

    key: int
    seconds: float
    result: RewardResult | None = None
    error: str = ""
    is_late: bool = False


class _Named(Struct, frozen=True):
    """Of a row, its id alone."""

    id: str


_PLAIN = frozenset({str, int, float, bool, type(None)})
_encoder = msgspec.msgpack.Encoder()
_named = msgspec.msgpack.Decoder(_Named)


def frame(message: Struct) -> bytes:
    """Encode a message with its length in front. Raises TypeError or ValueError for a value that MessagePack lacks."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class PairEncoder:
    """Encodes pairs of rollout and row. A row that belongs to several rollouts is encoded once."""

    def __init__(self) -> None:
        self._row: Row | None = None
        self._encoded = msgspec.Raw()

    def __call__(self, rollout: Rollout, row: Row) -> "EncodedPair":
        """Encode a pair. Raises TypeError, ValueError or OverflowError for a value that MessagePack lacks."""
        if row is not self._row:
            self._encoded, self._row = msgspec.Raw(_encoder.encode(plain_row(row))), row
        return EncodedPair(msgspec.Raw(_encoder.encode(rollout)), self._encoded)


def encode_pairs(pairs: Iterable[tuple[Rollout, Row]]) -> "Iterator[EncodedPair | str]":
    """Encode each pair. A pair that cannot be encoded gives the reason, as text."""
    encode = PairEncoder()
    for rollout, row in pairs:
        try:
            yield encode(rollout, row)
        except UNENCODABLE as error:
            yield f"row {row.id}: {error}"


class EncodedPair(Struct, frozen=True):
    """A rollout and its row, ready to be sent to any reward process."""

    rollout: msgspec.Raw
    row: msgspec.Raw

    def question(self, key: int) -> bytes:
        """The frame that asks for the score of this pair."""
        return frame(_EncodedQuestion(key, self.rollout, self.row))

    @property
    def row_id(self) -> str:
        """The id of the row."""
        return _named.decode(self.row).id


class FrameBuffer(Generic[T]):
    """Collects bytes as they come, and returns whole messages of one type.

    Raises ValueError, which names the wrong field, for bytes that cannot be such a message.
    """

    def __init__(self, kind: object, max_bytes: int = MAX_REPLY_BYTES):
        self._rest = b""
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[T]:
        """Take bytes, and yield the messages that they complete."""
        data = self._rest + data
        view, end = memoryview(data), 0  # a copy of what is left after each message would take longer than reading it
        try:
            while len(data) >= (begin := end + HEADER_BYTES):
                length = int.from_bytes(view[end:begin], "big")
                if length > self._max_bytes:
                    raise ValueError(f"a message of {length} bytes; at most {self._max_bytes} are allowed")
                if len(data) < begin + length:
                    return
                end = begin + length
                try:
                    message = self._decoder.decode(view[begin:end])
                except msgspec.DecodeError as error:
                    raise ValueError(str(error)) from None
                yield message
        finally:
            self._rest = data[end:]


def plain_row(row: Row) -> Any:
    """A row as if it came from JSON. Raises TypeError or ValueError for a value that JSON lacks."""
    plain = msgspec.to_builtins(row, str_keys=True, builtin_types=(bytes, bytearray), enc_hook=_plain)
    calls = [message["tool_calls"] for message in plain["messages"] if "tool_calls" in message]
    _refuse_bytes([plain["answer"], plain["fields"], calls])  # the other fields have types of their own
    return plain


def is_plain(row: Row) -> bool:
    """Whether the row is surely as if it came from JSON, so that `plain_row` would change nothing."""
    return (
        type(row.answer) in _PLAIN
        and all(type(name) is str and type(value) in _PLAIN for name, value in row.fields.items())
        and not any(message.tool_calls for message in row.messages)
    )


def _refuse_bytes(value: dict[Any, Any] | Sequence[object]) -> None:
    """Raise TypeError for bytes. JSON has no bytes, and a reward that got them as text would misread them."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list | tuple):
            _refuse_bytes(item)
        elif isinstance(item, bytes | bytearray):
            raise TypeError(f"a {type(item).__name__} cannot be sent to a reward process")


def _plain(value: Any) -> Any:
    """Convert a value of another type that rows may hold: a mapping, a NumPy value, or a date of another library."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} cannot be sent to a reward process")
