"""What an environment is given: the conversation so far, and the ways to go on with it.

    turn = await session.sample()                    one turn of the policy
    await session.add("tool", "42", call_id=call.id) one turn of the world
    await session.call_tools(turn)                   the tools of the YAML answer the calls of a turn

This module runs in the environment's process, so it imports neither torch nor pydantic.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from posttrain.episodes.toolbox.toolbox import Toolbox
from posttrain.episodes.wire import Ask, Begin, Full, History, PolicyTurn, Refused, Saved, Told
from posttrain.errors import PluginError
from posttrain.records import Message, RewardResult
from posttrain.scoring.plugins.results import to_result

ROLES = ("user", "tool", "system")
MAX_CHARS = 200_000  # of one added turn: no context of a model holds more
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # what MessagePack can hold


class ContextFullError(Exception):
    """No token is left for another turn. An environment may catch it to give a reward all the same; it cannot sample
    any more. Uncaught, it ends the episode as truncated, with the rewards so far."""


class WorldLostError(Exception):
    """Something that the environment depends on was lost, such as a process or a server of its own. The episode is
    tried once more, and is then unscored as `infrastructure`."""


BY_REWARD = object()  # returned by an environment that leaves the reward of its episode to the stage's `reward`


class Session:
    """One episode, from the environment's side.

    messages: the conversation so far. tools: the schemas that the policy was shown. seed: a number that is the same
    whenever this rollout is made again. turn: how many turns the policy has had. tokens_left: how many tokens its
    context still has room for; what is added next is not counted yet. restored: the state of the latest `checkpoint`
    if the episode goes on from one, else None.
    """

    def __init__(
        self,
        begin: Begin,
        send: Callable[[Ask | Saved], None],
        clock: Callable[[bool], None],
        *,
        toolbox: Toolbox | None = None,
        noted: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]] = lambda work: work,
    ):
        self.messages: list[Message] = list(begin.messages)
        self.tools = begin.tools
        self.seed = begin.seed
        self.turn = begin.turn
        self.restored = begin.restored
        self.tokens_left = begin.tokens_left
        self.added: list[Message] = []
        self.rewards: list[tuple[int, float]] = list(begin.rewards)
        self._key = begin.key
        self._send = send
        self._clock = clock  # called with whether the deadline of the environment runs
        self._toolbox = toolbox
        self._noted = noted  # has work that is a task of its own known as this episode's, should it hang
        self._answer: asyncio.Future[Told | Full | Refused] | None = None
        self._end = ""
        self._has_histories = False

    async def sample(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        after: History | None = None,
        with_tokens: bool = False,
    ) -> PolicyTurn:
        """The policy's next turn.

        max_tokens, temperature: None means those of the stage's `sampling`. A turn at another temperature is not
        trained on. stop: a text, or several, that end the turn and are part of it. seed: a whole number by which the
        turn is drawn; without it each turn is drawn anew. When this rollout is made again, the same seed after the same
        tokens gives the same turn, at the same weights. A turn that repeats one of its episode so is not trained on
        again. with_tokens: whether the turn has its tokens with their log-probabilities.

        after: all that the policy is to answer, instead of what was added. Where it begins with a conversation of
        this episode, the policy reads the very tokens that it sampled there; anything else is a branch. The stop text
        is then no part of the turn's text, malformed calls are text and are not answered, and after a full context
        shorter histories may follow.

        Raises ContextFullError if the context is full, ValueError for an argument that is wrong, and RuntimeError after
        the end of the episode or while another turn is sampled.
        """
        self._require_open("sample")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        _check_sampling(max_tokens, temperature, stops, seed=seed)
        if after is not None:
            if self.added:
                raise ValueError("turns were added that `after` would leave out; give them in it")
            self.messages = list(after.messages)
            self._has_histories = True
        self._answer = asyncio.get_running_loop().create_future()
        added, self.added = tuple(self.added), []
        self._clock(False)
        ask = Ask(self._key, added, max_tokens, temperature, stops, seed, history=after, with_tokens=with_tokens)
        try:
            self._send(ask)
            answer = await self._answer
        finally:
            self._answer = None
            self._clock(True)
        if isinstance(answer, Full):
            if after is None:
                self.close("its context is full")
            raise ContextFullError("no token is left for another turn of the policy")
        if isinstance(answer, Refused):
            raise ValueError(answer.why)
        self.messages += answer.messages
        self.tokens_left = answer.tokens_left
        self.turn += 1
        return answer.turn

    async def add(self, role: str, content: str, *, call_id: str | None = None, name: str | None = None) -> None:
        """Add a turn of the world, which the policy reads before its next turn.

        role: user, tool or system. call_id: of a tool turn, the call that it answers (`ToolCall.id`). name: of the
        speaker or the tool. Raises ValueError for another role, or a content that is no text, and RuntimeError after
        the end of the episode.
        """
        self._require_open("add a turn")
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; a turn of the world is one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"content is a {type(content).__name__}; it must be text: str(value), json.dumps(value)")
        if len(content) > MAX_CHARS:
            raise ValueError(f"content has {len(content)} characters; at most {MAX_CHARS} are allowed")
        if call_id is not None and role != "tool":
            raise ValueError(f"call_id is {call_id!r} in a turn of role {role}; only a tool turn answers a call")
        message = Message(role, content, tool_call_id=call_id, name=name)
        self.added.append(message)
        self.messages.append(message)

    async def call_tools(self, turn: PolicyTurn) -> None:
        """Have the tools of the YAML answer the calls of a turn, and add their results in the order of the calls.

        Several calls run side by side, as far as their tools can (`Toolbox.call`). A tool that fails answers with a
        text that begins with "Error:". Raises RuntimeError, before any call, for a tool that is only declared by its
        schema: the environment answers its calls itself, with `add`.
        """
        calls, toolbox = turn.tool_calls, self._toolbox
        names = toolbox.names if toolbox is not None else []
        if (unknown := next((call.name for call in calls if call.name not in names), None)) is not None:
            raise RuntimeError(
                f"the tool {unknown!r} is declared by its schema only, so the environment must answer its calls "
                f"with session.add; those that session.call_tools answers: {', '.join(names) or 'none'}"
            )
        if toolbox is None:
            return
        if len(calls) == 1:
            texts = [await toolbox.call(calls[0].name, calls[0].arguments)]
        else:
            texts = await asyncio.gather(*(self._noted(toolbox.call(call.name, call.arguments)) for call in calls))
        for call, text in zip(calls, texts, strict=True):
            await self.add("tool", text, call_id=call.id, name=call.name)

    def reward(self, value: float) -> None:
        """Add to the reward, for the policy's last turn. What the environment returns is added to the sum of these."""
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"the reward of a turn is {value}; it must be finite")
        self.rewards.append((self.turn, value))

    def checkpoint(self, state: Any) -> None:
        """Save the state of the environment: if its process is lost, the episode goes on from here.

        The environment is then called again with `restored`, and with the conversation and the rewards so far. state:
        JSON values, and not None. Raises ValueError for None, and after a turn that was asked for by `after`.
        """
        self._require_open("save a checkpoint")
        if state is None or self._has_histories:
            why = "turns were asked for by `after`" if self._has_histories else "the state is None"
            raise ValueError(f"there can be no checkpoint: {why}")
        added, self.added = tuple(self.added), []
        self._send(Saved(self._key, state, added, self.turn, tuple(self.rewards)))

    def take(self, answer: Told | Full | Refused) -> None:
        """Give `sample` its answer."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def close(self, why: str) -> None:
        """Refuse every later turn. why: what has happened, for the message."""
        self._end = self._end or why

    def _require_open(self, what: str) -> None:
        if self._end:
            raise RuntimeError(f"an environment cannot {what} any more: {self._end}")
        if self._answer is not None:
            raise RuntimeError(f"an environment cannot {what} while a turn of the policy is sampled")


def episode_result(value: Any, session: Session, *, is_full: bool = False) -> RewardResult | None:
    """The reward of the episode: what was returned, and the rewards of its turns; None for BY_REWARD. Raises
    PluginError if it is none."""
    if session.turn == 0 and not is_full:
        raise PluginError("the environment returned before the policy had a turn; it must await session.sample()")
    if value is BY_REWARD:
        if session.rewards:
            raise PluginError("the environment paid for turns and left its reward to the stage; it can do one of both")
        return None
    total = sum(reward for _, reward in session.rewards)
    if value is None and (session.rewards or is_full):
        return RewardResult(total, reason="the context was full" if is_full else "")
    result = to_result(value, "environment")
    return RewardResult(result.value + total, result.parts, result.reason)


def _check_sampling(max_tokens: Any, temperature: Any, stops: tuple[Any, ...], *, seed: Any) -> None:
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be a whole number of at least 1")
    if temperature is not None and not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature!r}; it must be a number of at least 0")
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop is {stops!r}; it must be a text, or several, that are not empty")
    if seed is not None and not (isinstance(seed, int) and MIN_SEED <= seed <= MAX_SEED):
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at most 64 bits, or None")
