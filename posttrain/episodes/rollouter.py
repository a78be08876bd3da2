"""Makes rollouts of episodes: an environment asks for turns of the policy, and the session of the rollout samples them.

    environment ── Ask ──► conversation.next: a suffix or a branch ──► session.add, session.sample ──► engine
        ▲                                                                        │ token ids
        └─────────── Told ◄── calls are read; a malformed one goes back to the policy ◄┘

A row without an environment has one turn. Whatever an environment does, the run goes on: the episode ends with a score,
or with the reason why it has none. If its process is lost, the episode begins again, and the turns that it had are not
sampled again as long as the world says the same.
"""

import zlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from posttrain.config.environments import EnvironmentConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.calls import CallReader, parser_of
from posttrain.episodes.conversation import Conversation
from posttrain.episodes.places import Places
from posttrain.episodes.pool import EnvironmentPool
from posttrain.episodes.process import Episode, EpisodeLost
from posttrain.episodes.talk import Talk
from posttrain.episodes.tools import environment_tools, row_tools
from posttrain.records import Message, Outcome, Prompt, Rollout, Row, Scored
from posttrain.sampling.rollouter import Session
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
        self._places = Places(config.limit)
        self._parser: str | None = None
        self._checked: set[str] = set()

    @property
    def pool(self) -> EnvironmentPool:
        """The environment processes."""
        return self._pool

    @property
    def limit(self) -> int | None:
        """How many episodes run at the same time; None if any number may."""
        return self._places.limit

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
        try:
            await self._places.take(session)
            return await self._tried(key, session)
        finally:
            self._places.leave(session)

    async def _tried(self, key: str, session: Session) -> Rollout:
        """The rollout of an episode, which begins again if its process is lost."""
        num_own = num_unknown = 0
        talk = self._talk(session, row_tools(self.config, session.row))
        while True:
            try:
                return await self._episode(key, talk, session)
            except EpisodeLost as lost:
                # Those that another episode takes down with it need no limit: that one is not tried for ever.
                num_own += lost.is_cause is True
                num_unknown += lost.is_cause is None
                if num_own == TRIES or num_unknown == MAX_LOSSES:
                    return session.rollout(Scored(None, lost.outcome, f"{lost}, in {num_own or num_unknown} tries"))
                if not talk.rewind():
                    session.begin_again()
                    talk = self._talk(session, row_tools(self.config, session.row))

    async def _episode(self, key: str, talk: Talk, session: Session) -> Rollout:
        row = session.row
        try:
            plain = plain_row(row)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return session.rollout(Scored(None, Outcome.ERROR, f"row {row.id}: {error}"))
        episode: Episode | None = None

        async def begin() -> None:
            nonlocal episode
            episode = await self._pool.begin(
                environment=key,
                row=plain,
                tools=row_tools(self.config, row),
                seed=self._seed_of(row, session),
                **talk.begin(),
            )

        try:
            await session.outside(begin())
            assert episode is not None
            return await talk.run(episode)
        finally:  # it may have begun although this rollout was ended before it was told
            if episode is not None:
                episode.end()

    def _talk(self, session: Session, tools: Sequence[dict[str, Any]]) -> Talk:
        def conversation(prompt: Prompt, tools: Sequence[dict[str, Any]]) -> Conversation:
            return Conversation(self._tokenizer, prompt, tools, checked=self._checked, heard=self._heard)

        return Talk(
            session,
            self._tokenizer,
            conversation,
            tools=tools,
            seed=self._seed_of(session.row, session),
            parser=self._parser_name,
            length=self._length,
            max_malformed=self.config.max_malformed,
        )

    def _parser_name(self) -> str:
        if self._parser is None:
            self._parser = parser_of(self._tokenizer, self.config.tool_parser)
        return self._parser

    def _seed_of(self, row: Row, session: Session) -> int:
        return zlib.crc32(f"{self._seed}/{row.id}/{session.flight.order}/{session.index}".encode())
