"""How a rollout is made: a rollouter decides what the policy is asked, and a session asks it.

    rollouter.run(prompt, session) ──► session.sample()   one turn of the policy: a trained segment
                                       session.add(ids)   text that is not the policy's: a segment of context
                       session.add(ids, keeps=n)   the same after the first n tokens alone: a new branch
                                       session.outside(w) the result of other work: a tool, a timer, another process
                                       session.rollout()  the record of all turns

A rollouter sees one rollout and its session. It does not see which engine samples, with which weights and in which
batch, nor that an engine is lost in the middle of a reply, which another engine then continues.

A rollouter awaits its session and nothing else. So the workers can run it without a task of its own, at the cost of a
function call; a task for each of a hundred thousand rollouts would take a fifth of the controller's time. Only work
outside of the session becomes a task, by `session.outside`.

Left out: text. A session takes and returns token ids, so that sampled tokens are never decoded and tokenized again.
"""

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from posttrain.errors import StageError
from posttrain.records import DrawnPrompt, FinishReason, Prompt, Rollout, Row, Scored, Segment, branches
from posttrain.sampling.requests import NOTHING, Completion, SampleRequest
from posttrain.sampling.rollouts import UNBEGUN, Reply, make_rollout, reply_of, segment_of
from posttrain.sampling.turns import Outside, Turn

T = TypeVar("T")


class Rollouter(Protocol):
    """Makes one rollout. Many run at the same time in one thread, so anything slow belongs into `session.outside`."""

    async def run(self, prompt: Prompt, session: "Session") -> Rollout:
        """Make the rollout of `session`, which begins with `prompt`.

        After a crash it is run again from the start. `session.sample` then returns the turns that it returned before,
        as long as the rollouter adds the same context between them.
        """
        ...


class SingleTurn:
    """One reply of the policy to the prompt."""

    async def run(self, prompt: Prompt, session: "Session") -> Rollout:
        """Sample once."""
        await session.sample()
        return session.rollout()


class Session:
    """One rollout that is being made: its segments so far, and the only way to add to them.

    index: place of the rollout in its group. recorded: the reply as far as it was sampled before a crash.
    since: the policy version that began to sample it.
    """

    __slots__ = (
        "_known", "_last", "_recorded", "_segments", "_turn", "_worker", "ended_s", "flight", "index", "is_waiting",
        "running", "since", "waits_for",
    )  # fmt: skip

    def __init__(self, flight: "Flight", index: int, recorded: Reply):
        self.flight = flight
        self.index = index
        self.ended_s = 0.0  # Unix time of the last sampled token
        self.running: Coroutine[Any, Any, Rollout] | None = None  # the rollouter, for whoever runs it
        self.waits_for: Outside | None = None
        self.since: int | None = None
        self.is_waiting = False  # for other rollouts to end, before it begins
        self._recorded = recorded
        self._known: dict[int, Completion] = {}  # whole turns by the place of their segment
        self._segments: tuple[Segment, ...] = ()
        self._turn: Turn | None = None  # that is being sampled
        self._last = NOTHING
        self._worker = flight.worker

    @property
    def row(self) -> Row:
        """The row of the prompt, with the answer and all other columns."""
        return self.flight.prompt.row

    @property
    def turn(self) -> Turn | None:
        """The turn that is being sampled."""
        return self._turn

    @property
    def reply(self) -> Reply:
        """The unfinished rollout after its prompt, with the part of the current turn that is sampled already."""
        if self._turn is None or not self._turn.completion.token_ids:
            return Reply(self._segments, "", FinishReason.RUNNING)
        return Reply((*self._segments, segment_of(self._turn.completion)), "", FinishReason.RUNNING)

    async def sample(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        trained: bool = True,
    ) -> Completion:
        """The policy's next turn, sampled after the prompt and every segment so far; it is a trained segment.

        max_tokens, temperature: of this turn; None means those of the config. A turn at another temperature is not
        trained on, because the trainer computes log-probabilities at that of the config. stop: texts that end the turn
        and are part of it. seed: see `SampleRequest`. trained: False for a turn that is not to be trained on either.
        Raises StageError while another turn is sampled.
        """
        if self._turn is not None:
            raise StageError(f"{self.name}: a turn was asked for while another one is sampled")
        begun, is_whole = self._recorded_turn()
        if is_whole:
            completion = begun
        else:
            turn = self._turn = Turn(
                self,
                self._request(max_tokens, temperature, stop, seed=seed),
                number=len(self._segments),
                begun=begun,
                last_worker=self._worker,
            )
            completion = await turn
            self._worker, self.ended_s = turn.worker, turn.ended_s
            self._turn = None
        segment = segment_of(completion)
        if not trained or temperature not in (None, self.flight.request.temperature):
            segment = replace(segment, trained=False)
        self._last = self._known[len(self._segments)] = completion
        self._segments = (*self._segments, segment)
        return completion

    async def outside(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` as a task and return its result, or raise its error. The task is cancelled if the rollout ends."""
        return await Outside(work)

    def add(self, token_ids: Sequence[int], *, keeps: int | None = None) -> None:
        """Add context that the policy did not sample, such as a tool's result or a user's turn. It is not trained on.

        token_ids: the ids exactly as the policy is to read them. keeps: begins a new branch, see `Segment`. Raises
        StageError while a turn is sampled.
        """
        if self._turn is not None:
            raise StageError(f"{self.name}: context was added while a turn is sampled")
        segment = Segment(tuple(token_ids), False, keeps=keeps)
        place = len(self._segments)
        if self._recorded.segments[place : place + 1] != (segment,):
            self._recorded = UNBEGUN  # the world says something else now, so what followed is of no use
        self._segments = (*self._segments, segment)

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The tokens that the policy sees now: those of the prompt and of every segment of the latest branch."""
        return branches(self.flight.request.prompt_ids, self._segments)[-1].token_ids

    @property
    def num_segments(self) -> int:
        """How many segments there are."""
        return len(self._segments)

    def begin_again(self, num_segments: int = 0) -> None:
        """Forget all segments but the first. The turns so far are returned again, as after a crash: see
        `Rollouter.run`."""
        self._recorded, self._segments = self.reply, self._segments[:num_segments]
        self._last = next((self._known[at] for at in reversed(range(num_segments)) if at in self._known), NOTHING)

    @property
    def is_over(self) -> bool:
        """Whether the rollout had ended, with its score, before a crash. `rollout` is then what was recorded."""
        return self._recorded.scored is not None

    def rollout(self, scored: Scored | None = None, finish_reason: FinishReason | None = None) -> Rollout:
        """The rollout of all segments so far.

        scored: given by whoever also scores it; it may then have no segment. finish_reason: None means that of the
        last turn. Raises StageError if nothing was sampled and it has no score either.
        """
        if self.is_over:
            return self._of(self._recorded)
        if not self._last.finish_reason and scored is None:
            raise StageError(f"{self.name}: a rollout was made of which nothing was sampled")
        reason = finish_reason or self._last.finish_reason or FinishReason.ABORT
        return self._of(Reply(self._segments, self._last.text, reason, scored))

    def _of(self, reply: Reply) -> Rollout:
        flight = self.flight
        return make_rollout(
            flight.prompt.prompt,
            reply,
            prompt_id=flight.prompt.row.id,
            group_id=f"g{flight.order}",
            index=self.index,
            system=flight.prompt.system,
            worker=self._worker,
            started_s=flight.began_s,
            finished_s=self.ended_s,
        )

    @property
    def name(self) -> str:
        """The name of the rollout in messages."""
        return f"row {self.flight.prompt.row.id}, rollout {self.index} of group {self.flight.order}"

    def _request(
        self, max_tokens: int | None, temperature: float | None, stop: Sequence[str], *, seed: int | None
    ) -> SampleRequest:
        request = self.flight.request
        if self._segments:
            # Before first turns: the engine still has what the policy has read, and the episode comes to its end.
            request = replace(request, prompt_ids=self.context_ids, priority=request.priority - 1, since=self.since)
        if temperature is not None:
            request = replace(request, temperature=temperature)
        if stop:
            request = replace(request, stop=tuple(stop))
        if seed is not None:
            request = replace(request, seed=seed)
        return request if max_tokens is None else replace(request, max_tokens=max_tokens)

    def _recorded_turn(self) -> tuple[Completion, bool]:
        """The next turn as far as it was recorded before a crash, and whether that is known to be the whole turn."""
        place, recorded = len(self._segments), self._recorded
        if place >= len(recorded.segments):
            return NOTHING, False
        segment = recorded.segments[place]
        if segment.sampler_logprobs is None:  # there was context before; now the rollouter samples at once
            self._recorded = UNBEGUN
            return NOTHING, False
        known = self._known.get(place)
        if known is not None and known.token_ids == segment.token_ids:
            return known, True
        is_whole = bool(recorded.finish_reason) and place == len(recorded.segments) - 1
        text, reason = (recorded.text, recorded.finish_reason) if is_whole else ("", FinishReason.RUNNING)
        return Completion(segment.token_ids, text, segment.sampler_logprobs, reason, segment.versions), is_whole


@dataclass(slots=True, eq=False)
class Flight:
    """A group that is being sampled.

    order: its place in the order of dispatch; groups with an order below 0 are side work (side.py). stamp: no worker of
    an older policy version may sample for it. version: if given, only the worker that is kept at this version may.
    request: the request for the first turn of the whole group, whose `n` is the group's size. recorded: each rollout as
    far as it was sampled before a crash, or (). worker: the one that gets the first turns if it can; "" leaves it open.
    rollouter: makes its rollouts, in place of the one that makes those of other groups.
    began_s: Unix time at which an engine first got it. sessions: those of the unfinished rollouts. finished: the
    finished rollouts by index.
    """

    order: int
    stamp: int
    prompt: DrawnPrompt
    request: SampleRequest
    recorded: Sequence[Reply] = ()
    version: int | None = None
    worker: str = ""
    rollouter: Rollouter | None = None
    began_s: float = 0.0
    sessions: list[Session] = field(default_factory=list)
    finished: dict[int, Rollout] = field(default_factory=dict)

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """The finished rollouts, in the order of their indices."""
        return tuple(self.finished[index] for index in sorted(self.finished))

    @property
    def replies(self) -> tuple[Reply, ...]:
        """Each rollout after its prompt, finished or as far as it is sampled."""
        if self.is_finished:
            return tuple(reply_of(rollout) for rollout in self.rollouts)
        if not self.sessions:
            return tuple(self.recorded) or (UNBEGUN,) * self.request.n
        return tuple(
            session.reply if (rollout := self.finished.get(session.index)) is None else reply_of(rollout)
            for session in self.sessions
        )

    @property
    def keys(self) -> set[int]:
        """The keys of its requests that are at engines now."""
        return {turn.key for session in self.sessions if (turn := session.turn) is not None}

    @property
    def is_finished(self) -> bool:
        """Whether every rollout is finished."""
        return len(self.finished) == self.request.n
