"""Makes rollouts of episodes: an environment asks for turns of the policy, and the session of the rollout samples them.

    environment ── Ask ──► conversation.next: a suffix or a branch ──► session.add, session.sample ──► engine
        ▲                                                                        │ token ids
        └─────────── Told ◄── calls are read; a malformed one goes back to the policy ◄┘

A row without an environment has one turn. Whatever an environment does, the run goes on: the episode ends with a score,
or with the reason why it has none. If its process is lost, the episode begins again, and the turns that it had are not
sampled again as long as the world says the same.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

from posttrain.config.environments import EnvironmentConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.calls import CallReader, parser_of
from posttrain.episodes.conversation import Continuation, Conversation
from posttrain.episodes.pool import EnvironmentPool
from posttrain.episodes.process import Episode, EpisodeLost
from posttrain.episodes.tools import environment_tools, row_tools
from posttrain.episodes.wire import Ask, Ended, Full, PolicyTurn, Told
from posttrain.records import (
    FinishReason,
    Message,
    Outcome,
    Prompt,
    RewardResult,
    Rollout,
    Row,
    Scored,
    turn_part,
)
from posttrain.sampling.requests import Completion
from posttrain.sampling.rollouter import Session
from posttrain.scoring.plugins.target import describe
from posttrain.scoring.pool.wire import plain_row

TRIES = 2  # of an episode that is late, or whose process dies while its code is running
MAX_LOSSES = 5  # of the process of an episode, when nobody is known to be the cause


class EnvironmentRollouter:
    """A `sampling.rollouter.Rollouter`. Use it as an async context in the event loop that samples.

    length: how many tokens the engine can hold. seed: of the stage. heard: see `Conversation`.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        tokenizer: Tokenizer,
        *,
        length: int,
        seed: int,
        heard: Callable[[int, Message], None] | None = None,
    ):
        self.config = config
        self._tokenizer = tokenizer
        self._length = length
        self._seed = seed
        self._heard = heard
        self._pool = EnvironmentPool(config)
        self._parser: str | None = None
        self._checked: set[str] = set()

    @property
    def pool(self) -> EnvironmentPool:
        """The environment processes."""
        return self._pool

    @property
    def reading(self) -> tuple[str | None, int]:
        """Which parser is asked for, and how often in a row a malformed call may be tried again."""
        return self.config.tool_parser, self.config.max_malformed

    async def __aenter__(self) -> "EnvironmentRollouter":
        for tools in filter(None, map(environment_tools, self.config.functions.values())):
            CallReader(self._parser_name(), self._tokenizer, tools)  # a parser that does not fit is told of at once
        await self._pool.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.close()

    async def run(self, prompt: Prompt, session: Session) -> Rollout:
        """Make the rollout of one episode, or of one turn for a row without an environment."""
        key = self.config.key_of(session.row.capability)
        if key is None:
            await session.sample()
            return session.rollout()
        if session.is_over:
            return session.rollout()
        num_own = num_unknown = 0
        while True:
            try:
                return await self._episode(key, prompt, session)
            except EpisodeLost as lost:
                # Those that another episode takes down with it need no limit: that one is not tried for ever.
                num_own += lost.is_cause is True
                num_unknown += lost.is_cause is None
                if num_own == TRIES or num_unknown == MAX_LOSSES:
                    return session.rollout(Scored(None, lost.outcome, f"{lost}, in {num_own or num_unknown} tries"))
                session.begin_again()

    async def _episode(self, key: str, prompt: Prompt, session: Session) -> Rollout:
        row = session.row
        try:
            plain = plain_row(row)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return session.rollout(Scored(None, Outcome.ERROR, f"row {row.id}: {error}"))
        tools = row_tools(self.config, row)
        begun = self._pool.begin(
            environment=key,
            row=plain,
            messages=prompt.messages,
            tools=tools,
            seed=self._seed_of(row, session),
            tokens_left=self._length - len(session.context_ids),
        )
        episode = await session.outside(begun)
        talk = _Talk(
            session,
            Conversation(self._tokenizer, prompt, tools, checked=self._checked, heard=self._heard),
            CallReader(self._parser_name(), self._tokenizer, tools) if tools else None,
            length=self._length,
            max_malformed=self.config.max_malformed,
        )
        try:
            return await talk.run(episode)
        finally:
            episode.end()

    def _parser_name(self) -> str:
        if self._parser is None:
            self._parser = parser_of(self._tokenizer, self.config.tool_parser)
        return self._parser

    def _seed_of(self, row: Row, session: Session) -> int:
        return zlib.crc32(f"{self._seed}/{row.id}/{session.flight.order}/{session.index}".encode())


def num_failures(added: Sequence[Message]) -> int:
    """How many of the world's turns are results of tools that failed, which begin with "Error:"."""
    return sum(message.role == "tool" and message.text.startswith("Error:") for message in added)


class _FullError(Exception):
    """The context has no room for another turn."""


class _Talk:
    """One episode from the stage's side, from its beginning to its end."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        reader: CallReader | None,
        *,
        length: int,
        max_malformed: int,
    ):
        self._session = session
        self._conversation = conversation
        self._reader = reader
        self._length = length
        self._max_malformed = max_malformed
        self._num_turns = self._num_calls = self._num_malformed = self._num_failures = 0
        self._told = [0]  # for each turn that the environment was told of, its place among all turns of the policy
        self._is_full = False

    async def run(self, episode: Episode) -> Rollout:
        """Answer the environment until it ends. Raises EpisodeLost."""
        while True:
            event = await self._session.outside(episode.next())
            if isinstance(event, Ended):
                return self._ended(event)
            self._num_failures += num_failures(event.added)
            before = len(self._conversation.messages) + len(event.added)
            try:
                self._conversation.add(event.added)
                turn = await self._turns(event)
            except _FullError:
                self._is_full = True
                episode.answer(Full(episode.key))
            except EpisodeLost:
                raise
            except Exception as error:
                reason = f"the conversation cannot go on: {describe(error)}"
                return self._session.rollout(Scored(None, Outcome.ERROR, reason))
            else:
                self._told.append(self._num_turns)
                left = self._length - len(self._session.context_ids)
                episode.answer(Told(episode.key, turn, tuple(self._conversation.messages[before:]), left))

    async def _turns(self, ask: Ask) -> PolicyTurn:
        """The policy's turn; and again, as long as it has a malformed call, up to `max_malformed` times."""
        malformed = 0
        self._go_on(self._conversation.next(self._session.context_ids))
        while True:
            turn, problem = await self._turn(ask)
            if not problem or malformed == self._max_malformed:
                return turn
            malformed += 1
            self._go_on(self._told_of(problem, turn))

    async def _turn(self, ask: Ask) -> tuple[PolicyTurn, str]:
        session = self._session
        room = self._length - len(session.context_ids)
        if room < 1:
            raise _FullError
        limit = min(room, ask.max_tokens or session.flight.request.max_tokens)
        said = await session.sample(max_tokens=limit, temperature=ask.temperature, stop=ask.stop)
        self._num_turns += 1
        return self._read(said)

    def _read(self, said: Completion) -> tuple[PolicyTurn, str]:
        """The turn as the environment gets it, and what is wrong with a call in it."""
        message, problem = Message("assistant", said.text), ""
        if self._reader is not None:
            ended = said.token_ids[-1:] and said.token_ids[-1] in self._session.flight.request.stop_token_ids
            read = self._reader.read(said.token_ids[:-1] if ended else said.token_ids, said.text)
            message, problem = Message("assistant", read.content, read.calls), read.problem
            self._num_calls += len(read.calls)
            self._num_malformed += bool(problem)
        self._conversation.add_said(message)
        calls = () if problem else message.tool_calls
        reason = "length" if said.finish_reason == FinishReason.LENGTH else "stop"
        return PolicyTurn(message.text if calls else said.text, calls, reason, len(said.token_ids)), problem

    def _told_of(self, problem: str, turn: PolicyTurn) -> Continuation:
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
            return conversation.next(self._session.context_ids)
        except Exception:
            del conversation.messages[num_messages:]
            conversation.add([Message("user", text)])
            return conversation.next(self._session.context_ids)

    def _go_on(self, continuation: Continuation) -> None:
        if continuation.token_ids or continuation.keeps is not None:
            self._session.add(continuation.token_ids, keeps=continuation.keeps)

    def _ended(self, ended: Ended) -> Rollout:
        """The rollout with its score. What the world said after the last turn, nobody reads."""
        result = ended.result
        if result is not None:
            failures = self._num_failures + num_failures(ended.added)
            counts = {
                "turns": self._num_turns,
                "tool_calls": self._num_calls,
                "malformed_calls": self._num_malformed,
                "tool_failures": failures,
            }
            turns: dict[str, float] = defaultdict(float)
            for turn, value in ended.rewards:
                turns[turn_part(self._told[min(max(turn, 0), len(self._told) - 1)])] += value
            # What the environment itself named like a turn was not paid for it, so no advantage may come of it.
            own = {name: value for name, value in result.parts.items() if not name.startswith("turn ")}
            result = RewardResult(result.value, {**own, **turns, **counts}, result.reason)
        is_full = self._is_full or ended.is_full
        return self._session.rollout(
            Scored(result, ended.outcome, ended.reason), FinishReason.LENGTH if is_full else None
        )
