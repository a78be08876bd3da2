"""One episode from the stage's side: each turn that its environment asks for is sampled in the session of the rollout.

Two ways to ask are known, and both read on in the same session. An environment adds turns to one conversation; a
history (`Session.sample(after=...)`, which the gateway of agents uses) may be any conversation of the episode
(histories.py). What differs from what the policy read last begins a new branch.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any

from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.calls import CallReader, ReadTurn, without_stop
from posttrain.episodes.conversation import Continuation, Conversation, num_common
from posttrain.episodes.histories import Histories
from posttrain.episodes.process import Episode, EpisodeLost
from posttrain.episodes.seeds import TurnSeeds
from posttrain.episodes.tools import tools_problem
from posttrain.episodes.wire import Ask, Ended, Full, History, PolicyTurn, Refused, Saved, Told
from posttrain.errors import DataError, UserError
from posttrain.records import (
    EPISODE_COUNTS,
    FinishReason,
    Message,
    Outcome,
    Prompt,
    RewardResult,
    Rollout,
    Scored,
    ToolCall,
    turn_part,
)
from posttrain.sampling.requests import Completion
from posttrain.sampling.rollouter import Session
from posttrain.scoring.plugins.target import describe

_NO_PROMPT = Prompt((), ())


def num_failures(added: Sequence[Message]) -> int:
    """How many of the world's turns are results of tools that failed, which begin with "Error:"."""
    return sum(message.role == "tool" and message.text.startswith("Error:") for message in added)


class _FullError(Exception):
    """The context has no room for another turn."""


class _RefusedError(Exception):
    """A history that cannot be shown to the policy."""


# What a talk knows of its conversation, besides the conversation itself.
_OF_CONVERSATION = (
    "_ids", "_num_turns", "_num_calls", "_num_malformed", "_num_failures", "_told", "_is_full", "_seeds"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint of the environment, and the talk as it was then. num_segments: of the session. kept: by name."""

    told: Saved
    conversation: Conversation
    num_segments: int
    kept: dict[str, Any]


class Talk:
    """One episode, from its beginning to its end.

    begin: makes a conversation that begins with messages, for the tools that are shown with it. seed: of the episode.
    parser: the name of vLLM's parser of calls; it is called where there are tools.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        begin: Callable[[Prompt, Sequence[dict[str, Any]]], Conversation],
        *,
        tools: Sequence[dict[str, Any]],
        seed: int,
        parser: Callable[[], str],
        length: int,
        max_malformed: int,
    ):
        prompt = session.flight.prompt.prompt
        self._session = session
        self._tokenizer = tokenizer
        self._parser = parser
        self._conversation = begin(prompt, tools)
        self._ids = prompt.token_ids  # what the policy has read and said in that conversation
        self._histories = Histories(tokenizer, lambda shown: begin(_NO_PROMPT, shown))
        self._call_numbers = count(1)
        self._reader = self._reader_of(tools, is_strict=True)
        self._readers: dict[str, CallReader | None] = {}  # of histories
        self._seeds = TurnSeeds(seed)
        self._length = length
        self._max_malformed = max_malformed
        self._num_turns = self._num_calls = self._num_malformed = self._num_failures = 0
        self._told = [0]  # for each turn that the environment was told of, its place among all turns of the policy
        self._is_full = False
        self._saved: _Checkpoint | None = None

    async def run(self, episode: Episode) -> Rollout:
        """Answer the environment until it ends. Raises EpisodeLost."""
        while True:
            event = await self._session.outside(episode.next())
            if isinstance(event, Saved):
                self._save(event)
                continue
            if isinstance(event, Ended):
                if event.outcome == Outcome.INFRASTRUCTURE:
                    raise EpisodeLost(event.reason, is_cause=True)
                return self._ended(event)
            try:
                answer = await (self._turns(event) if event.history is None else self._after(event, event.history))
            except _FullError:
                episode.answer(Full(episode.key))
            except _RefusedError as error:
                episode.answer(Refused(episode.key, str(error)))
            except Exception as error:
                reason = f"the conversation cannot go on: {describe(error)}"
                return self._session.rollout(Scored(None, Outcome.ERROR, reason))
            else:
                self._told.append(self._num_turns)
                episode.answer(answer)

    def _save(self, saved: Saved) -> None:
        self._num_failures += num_failures(saved.added)
        self._conversation.add(saved.added)
        kept = {name: copy(getattr(self, name)) for name in _OF_CONVERSATION}
        self._saved = _Checkpoint(saved, self._conversation.fork(), self._session.num_segments, kept)

    def rewind(self) -> bool:
        """Go back to the latest checkpoint, with the session. False if there is none."""
        if (saved := self._saved) is None:
            return False
        self._session.begin_again(saved.num_segments)
        self._conversation = saved.conversation.fork()
        for name, value in saved.kept.items():
            setattr(self, name, copy(value))
        return True

    def begin(self) -> dict[str, Any]:
        """The fields of `Begin` that say where the episode begins."""
        fields = {"messages": tuple(self._conversation.messages), "tokens_left": self._length - len(self._ids)}
        if self._saved is None:
            return fields
        told = self._saved.told
        return {**fields, "restored": told.state, "turn": told.turn, "rewards": told.rewards}

    # ------------------------------------------------------------------ one conversation, to which turns are added

    async def _turns(self, ask: Ask) -> Told:
        """The policy's turn; and again, as long as it has a malformed call, up to `max_malformed` times."""
        self._num_failures += num_failures(ask.added)
        before = len(self._conversation.messages) + len(ask.added)
        self._conversation.add(ask.added)
        self._go_on(self._conversation.next(self._ids))
        malformed = 0
        while True:
            try:
                said = await self._sample(ask)
            except _FullError:
                self._is_full = True
                raise
            self._ids = (*self._ids, *said.token_ids)
            read = self._read(said, self._reader)
            self._conversation.add_said(Message("assistant", read.content, read.calls))
            if not read.problem or malformed == self._max_malformed:
                break
            malformed += 1
            self._go_on(self._told_of(read.problem))
        calls = () if read.problem else read.calls
        text = read.content if calls else said.text
        turn = self._turn(ask, said, text, calls=calls, num_read=len(self._ids) - len(said.token_ids))
        messages = tuple(self._conversation.messages[before:])
        return Told(ask.key, turn, messages, self._length - len(self._ids))

    def _go_on(self, continuation: Continuation) -> None:
        self._ids = continuation.after(self._ids)
        self._show(self._ids)

    # ------------------------------------------------------------------ histories

    async def _after(self, ask: Ask, history: History) -> Told:
        """The policy's turn after a history. What was read there before keeps its tokens."""
        try:
            if problem := tools_problem(history.tools):
                raise DataError(f"tools: {problem}")
            reader = self._history_reader(history.tools) if history.prompt is None else None
            place = self._histories.place(history)
        except UserError as error:
            raise _RefusedError(str(error)) from None
        if len(place.ids) >= self._length:
            raise _FullError
        self._show(place.ids)
        said = await self._sample(ask)
        read = self._read(said, reader)
        calls = () if read.problem else read.calls
        text = without_stop(read.content if calls else said.text, ask.stop)
        message = Message("assistant", text, calls)
        self._histories.note(place, message, said.token_ids, num_ends=self._num_ends(said))
        turn = self._turn(ask, said, text, calls=calls, num_read=len(place.ids))
        return Told(ask.key, turn, (message,), self._length - len(place.ids) - len(said.token_ids))

    def _history_reader(self, tools: Sequence[dict[str, Any]]) -> CallReader | None:
        key = repr(tools)
        if key not in self._readers:
            self._readers[key] = self._reader_of(tools, is_strict=False)
        return self._readers[key]

    # ------------------------------------------------------------------ both

    def _show(self, ids: tuple[int, ...]) -> None:
        """Have the policy read `ids` next: what is new after all that it read last, or else a branch."""
        now = self._session.context_ids
        common = len(now) if ids[: len(now)] == now else num_common(now, ids)
        if common == len(now):
            if len(ids) > common:
                self._session.add(ids[common:])
            return
        common = min(common, len(ids) - 1)  # a branch has a token of its own
        self._session.add(ids[common:], keeps=common)

    async def _sample(self, ask: Ask) -> Completion:
        session = self._session
        room = self._length - len(ids := session.context_ids)
        if room < 1:
            raise _FullError
        limit = min(room, ask.max_tokens or session.flight.request.max_tokens)
        seed, is_new = self._seeds.of_turn(ask.seed, ids)
        said = await session.sample(
            max_tokens=limit, temperature=ask.temperature, stop=ask.stop, seed=seed, trained=is_new
        )
        self._num_turns += 1
        return said

    def _read(self, said: Completion, reader: CallReader | None) -> ReadTurn:
        """The turn with its calls, and what is wrong with one of them."""
        if reader is None:
            return ReadTurn(said.text)
        read = reader.read(said.token_ids[: len(said.token_ids) - self._num_ends(said)], said.text)
        self._num_calls += len(read.calls)
        self._num_malformed += bool(read.problem)
        return read

    def _turn(self, ask: Ask, said: Completion, text: str, *, calls: tuple[ToolCall, ...], num_read: int) -> PolicyTurn:
        """The turn as the environment gets it."""
        reason = "length" if said.finish_reason == FinishReason.LENGTH else "stop"
        tokens: tuple[tuple[str, float], ...] = ()
        if ask.with_tokens:
            tokens = tuple(
                (self._tokenizer.decode([token]), logprob)
                for token, logprob in zip(said.token_ids, said.logprobs, strict=True)
            )
        return PolicyTurn(text, calls, reason, len(said.token_ids), num_read, tokens)

    def _num_ends(self, said: Completion) -> int:
        """How many of the last tokens only end the turn: one, or none if it was cut off."""
        return int(bool(said.token_ids) and said.token_ids[-1] in self._session.flight.request.stop_token_ids)

    def _reader_of(self, tools: Sequence[dict[str, Any]], *, is_strict: bool) -> CallReader | None:
        if not tools:
            return None
        return CallReader(self._parser(), self._tokenizer, tools, numbers=self._call_numbers, is_strict=is_strict)

    def _told_of(self, problem: str) -> Continuation:
        """Tell the policy of a malformed call: in a tool turn, or in a user turn where the template takes no such."""
        conversation = self._conversation
        calls = conversation.messages[-1].tool_calls
        text = f"Error: {problem}"
        if len(calls) > 1:
            text = f"{text}; no call of this turn was executed"
        num_messages = len(conversation.messages)
        conversation.add([Message("tool", text, tool_call_id=call.id, name=call.name) for call in calls])
        if not calls:
            conversation.add([Message("tool", text)])
        try:
            return conversation.next(self._ids)
        except Exception:
            del conversation.messages[num_messages:]
            conversation.add([Message("user", text)])
            return conversation.next(self._ids)

    def _ended(self, ended: Ended) -> Rollout:
        """The rollout with its score. What the world said after the last turn, nobody reads."""
        result = ended.result
        if result is not None:
            failures = self._num_failures + num_failures(ended.added)
            found = (self._num_turns, self._num_calls, self._num_malformed, failures)
            counts = dict(zip(EPISODE_COUNTS, found, strict=True))
            turns: dict[str, float] = defaultdict(float)
            for turn, value in ended.rewards:
                turns[turn_part(self._told[min(max(turn, 0), len(self._told) - 1)])] += value
            # What the environment itself named like a turn was not paid for it, so no advantage may come of it.
            own = {name: value for name, value in result.parts.items() if not name.startswith("turn ")}
            result = RewardResult(result.value, {**own, **turns, **counts}, result.reason)
        is_full = self._is_full or ended.is_full
        is_open = result is None and ended.outcome == Outcome.SCORED  # the stage's reward is to score it
        scored = None if is_open else Scored(result, ended.outcome, ended.reason)
        return self._session.rollout(scored, FinishReason.LENGTH if is_full else None)
