"""Replies between vLLM, which collects their tokens, and the caller, who gets them in pieces.

vLLM's output handler puts every output of a request into that request's queue, for which a task waits. A `Reply` takes
the queue's place and only marks itself as ready, which needs no task and no copy for each token. The tokens are read
from vLLM's own lists when the caller collects a piece. All that have arrived can therefore be read even after the
engine has died.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.compat.vllm import GrowingReply
from posttrain.errors import StageError
from posttrain.records import FinishReason, VersionSpan
from posttrain.sampling.requests import Piece

GATHER_S = 0.02  # some engine steps; a call between processes costs about a millisecond on either side


def spans_between(
    starts: Sequence[tuple[str, int]], begin: int, end: int, *, shift: int = 0
) -> tuple[VersionSpan, ...]:
    """Which weights sampled tokens [begin, end), with all places in the result moved by `shift`.

    starts: (version, place of its first token), in order. Example: spans_between([("3", 0), ("4", 10)], 8, 12) is
    (VersionSpan(3, 8, 10), VersionSpan(4, 10, 12)).
    """
    if not starts:
        return ()
    ends = [*(place for _, place in starts[1:]), end]
    return tuple(
        VersionSpan(int(version), max(first, begin) + shift, min(last, end) + shift)
        for (version, first), last in zip(starts, ends, strict=True)
        if max(first, begin) < min(last, end)
    )


def join_spans(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Join neighbouring spans of the same version."""
    joined: list[VersionSpan] = []
    for span in spans:
        if joined and joined[-1].policy_version == span.policy_version and joined[-1].end == span.start:
            joined[-1] = VersionSpan(span.policy_version, joined[-1].start, span.end)
        else:
            joined.append(span)
    return tuple(joined)


class Reply:
    """One reply in the engine, in place of vLLM's `RequestOutputCollector`, of which vLLM calls only `put`.

    key, index: the caller's key of the request, and which of its replies this is. begun: tokens that another engine
    sampled before; places in pieces are counted from the first of them. choice_ids: see `SampleRequest`.
    """

    __slots__ = (
        "_choice_ids", "_final", "_num_cached", "_outbox", "_received", "_sent", "_spans", "begun", "index", "key",
        "request_id",
    )  # fmt: skip

    def __init__(
        self,
        outbox: "Outbox",
        key: int,
        index: int,
        *,
        request_id: str,
        begun: tuple[int, ...] = (),
        choice_ids: tuple[int, ...] | None = None,
    ):
        self.key = key
        self.index = index
        self.request_id = request_id
        self.begun = begun
        self._choice_ids = choice_ids
        self._outbox = outbox
        self._received: GrowingReply | None = None
        self._sent = 0  # tokens of this engine that the caller has collected
        self._spans: list[VersionSpan] = []
        self._final: Any = None
        self._num_cached = 0

    def follow(self, state: Any) -> None:
        """state: vLLM's `RequestState` of this request, which its output handler fills."""
        self._received = GrowingReply(state)

    @property
    def num_unsent(self) -> int:
        """Tokens that have arrived and that the caller has not collected."""
        return self._received.num_tokens - self._sent if self._received is not None else 0

    def put(self, output: Any) -> None:
        """Called by vLLM now and then while the reply grows, when it is finished, and with an error if the engine dies.

        output: a RequestOutput or an Exception.
        """
        self._outbox.on_output(output)
        if isinstance(output, Exception):
            return
        if output.finished:
            self._final, self._num_cached = output.outputs[0], output.num_cached_tokens or 0
        if output.finished or self.num_unsent >= self._outbox.stream_interval:
            self._outbox.add(self)

    def take(self, decode: Callable[[list[int]], str]) -> Piece:
        """The tokens that arrived since the last call.

        Raises StageError if the version spans of all pieces are not those that vLLM reports for the finished reply.
        """
        received, first, shift = self._received, self._sent, len(self.begun)
        assert received is not None
        token_ids = tuple(received.token_ids(first))
        choices: dict[int, float] = {}
        if self._choice_ids and token_ids:
            found = received.choice_logprobs()
            choices = {token: found[token] for token in self._choice_ids if token in found}
            logprobs = tuple(found[token] for token in token_ids)
        else:
            logprobs = tuple(received.logprobs(first))
        if len(logprobs) != len(token_ids):
            raise StageError(f"vLLM gave {len(logprobs)} log-probabilities for {len(token_ids)} tokens")
        self._sent = end = first + len(token_ids)
        versions = spans_between(received.version_starts, first, end, shift=shift)
        if sum(span.end - span.start for span in versions) != len(token_ids):
            raise StageError(f"reply {self.key}/{self.index}: vLLM does not say which weights sampled its tokens")
        self._spans += versions
        finish_reason, text = FinishReason.RUNNING, ""
        if self._final is not None:
            finish_reason = finish_reason_of(self._final.finish_reason)
            text = decode([*self.begun, *received.token_ids()])
            self._compare()
        return Piece(
            self.key, self.index, shift + first, token_ids, logprobs, versions, finish_reason, text, choices,
            self._num_cached,
        )  # fmt: skip

    @property
    def is_finished(self) -> bool:
        """Whether the last token has arrived."""
        return self._final is not None

    def _compare(self) -> None:
        shift = len(self.begun)
        said = tuple(
            VersionSpan(int(span.version), span.start + shift, span.end + shift)
            for span in self._final.weight_versions or ()
        )
        if join_spans(self._spans) != said:
            raise StageError(f"reply {self.key}/{self.index}: pieces by {self._spans}, but vLLM says {said}")


class Outbox:
    """The open replies of an engine, and which of them have a piece for the caller.

    on_output: called with every output or error of vLLM before anything else is done with it.
    """

    def __init__(self, stream_interval: int, on_output: Callable[[Any], None]):
        self.stream_interval = stream_interval
        self.on_output = on_output
        self.open: dict[int, dict[int, Reply]] = {}  # by key and index
        self._ready: dict[Reply, None] = {}
        self._made: list[Piece] = []
        self._event = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Replies that are not finished, or whose last piece the caller has not collected."""
        return sum(map(len, self.open.values()))

    def admit(self, reply: Reply) -> None:
        """Open a reply, before its request is sent to the engine."""
        self.open.setdefault(reply.key, {})[reply.index] = reply

    def add(self, reply: Reply) -> None:
        """Mark that `reply` has a piece. Ignored if its request was removed: vLLM sends a last output for it too."""
        if self.open.get(reply.key, {}).get(reply.index) is reply:
            self._ready[reply] = None
            self._event.set()

    def add_piece(self, piece: Piece) -> None:
        """Add the piece of a reply that needed no engine, because it was complete when it was submitted."""
        self._made.append(piece)
        self._event.set()

    def flush(self) -> None:
        """Mark every reply that has tokens, because the engine is lost and no more will arrive."""
        for replies in self.open.values():
            for reply in replies.values():
                if reply.num_unsent:
                    self._ready[reply] = None
        self._event.set()

    def wake(self) -> None:
        """Let a waiting `wait` return although there is no piece."""
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Wait for a piece, for at most `seconds`, and then a moment more, so that one call returns many pieces.

        Not if there is none to come: an agent that makes one call after the other would wait that moment each time.
        """
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
                if len(self._ready) < self.num_open:
                    await asyncio.sleep(GATHER_S)
        except TimeoutError:
            pass

    def take(self, decode: Callable[[list[int]], str]) -> list[Piece]:
        """Return every piece that is ready."""
        ready, self._ready = self._ready, {}
        pieces, self._made = self._made, []
        self._event.clear()
        for reply in ready:
            pieces.append(reply.take(decode))
            if reply.is_finished:
                self._close(reply)
        return pieces

    def remove(self, key: int) -> list[Reply]:
        """Remove a request with the pieces that were not collected; returns its replies."""
        replies = list(self.open.pop(key, {}).values())
        for reply in replies:
            self._ready.pop(reply, None)
        self._made = [piece for piece in self._made if piece.key != key]
        return replies

    def _close(self, reply: Reply) -> None:
        replies = self.open[reply.key]
        del replies[reply.index]
        if not replies:
            del self.open[reply.key]


def finish_reason_of(reason: str | None) -> FinishReason:
    """vLLM's word for how a finished reply ended. A word that we do not know is a reply that the engine gave up."""
    known = reason in (FinishReason.STOP, FinishReason.LENGTH)
    return FinishReason(reason) if known else FinishReason.ABORT
