"""What a rollouter waits for: a turn of the policy while it is sampled, or other work.

Both are awaited by the rollouter's session and handed to the code that runs the rollouter (running.py), which goes on
with it when the turn is whole or the work is done.
"""

import asyncio
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any

from posttrain.errors import StageError
from posttrain.sampling.requests import Completion, Piece, SampleRequest
from posttrain.sampling.stream import join_spans

if TYPE_CHECKING:
    from posttrain.sampling.rollouter import Session


class Turn:
    """One reply of the policy while it is sampled.

    session: that of its rollout. flight: its group. request: the request for this turn, whose `n` is ignored. number:
    how many segments are before it in its rollout. completion: the reply as far as it is sampled. key: the key of the
    request to the engine. worker: the name of the worker that samples it. ended_s: Unix time of the last piece.
    """

    __slots__ = ("completion", "ended_s", "flight", "key", "number", "request", "session", "worker")

    def __init__(
        self, session: "Session", request: SampleRequest, *, number: int, begun: Completion, last_worker: str
    ) -> None:
        self.session = session
        self.flight = session.flight
        self.request = request
        self.number = number
        self.completion = begun
        self.key = 0
        self.worker = last_worker
        self.ended_s = 0.0

    def __await__(self) -> Generator["Turn", None, Completion]:
        yield self
        return self.completion

    def take(self, piece: Piece, now: float) -> None:
        """Add the next tokens. Raises StageError for a piece that does not follow."""
        before = self.completion
        if piece.start != len(before.token_ids):
            order = self.flight.order
            raise StageError(f"group {order}: a piece starts at {piece.start}, not at {len(before.token_ids)}")
        if before.token_ids:
            completion = Completion(
                before.token_ids + piece.token_ids,
                piece.text,
                before.logprobs + piece.logprobs,
                piece.finish_reason,
                join_spans((*before.versions, *piece.versions)),
                piece.choice_logprobs or before.choice_logprobs,
            )
        else:
            completion = Completion(
                piece.token_ids,
                piece.text,
                piece.logprobs,
                piece.finish_reason,
                join_spans(piece.versions),
                piece.choice_logprobs,
            )
        if piece.finish_reason:
            self.finish(completion, now)
        else:
            self.completion = completion

    def finish(self, completion: Completion, now: float) -> None:
        """Note that the whole reply is sampled."""
        self.completion, self.ended_s = completion, now


class Outside:
    """Work that a rollouter waits for beside its session. The code that runs the rollouter makes a task of it."""

    __slots__ = ("task", "work")

    def __init__(self, work: Coroutine[Any, Any, Any]):
        self.work = work
        self.task: asyncio.Task[Any] | None = None

    def __await__(self) -> Generator["Outside", None, Any]:
        yield self
        assert self.task is not None
        return self.task.result()
