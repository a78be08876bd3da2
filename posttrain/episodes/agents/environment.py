"""The built-in environment `agent`: an episode is one run of a program that talks with the policy by itself.

Its YAML has a short form: `environment: {command: [python, my_agent.py]}`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from posttrain.episodes.agents.gateway import running_gateway
from posttrain.episodes.agents.process import AgentProcess
from posttrain.episodes.agents.protocol import messages_json
from posttrain.episodes.session import BY_REWARD, ContextFullError, Session, WorldLostError
from posttrain.errors import PluginError
from posttrain.records import RewardResult, Row


class _Paid(msgspec.Struct):
    """The last line of an agent's output, where it is no number."""

    reward: float
    parts: dict[str, float] = {}
    reason: str = ""


async def agent(
    session: Session,
    row: Row,
    *,
    command: Sequence[str],
    scored_by: Literal["agent", "reward"] = "agent",
    model: str = "policy",
    max_calls: int = 100,
    own_temperature: bool = False,
) -> Any:
    """Run an agent that talks with the policy through the client of OpenAI.

    command: the program and its arguments. scored_by: `agent` for its last line of output, or what it posts to the
    gateway; `reward` for the stage's `reward`. model: the name under which the agent knows the policy. max_calls: how
    often it may ask the policy. own_temperature: whether a call may set its temperature; a turn at another temperature
    than the stage's is not trained on. They are checked before a run (`scoring/plugins/commands.py`).
    """
    gateway = await running_gateway()
    with gateway.episode(
        session, model=model, max_calls=max_calls, own_temperature=own_temperature, takes_reward=scored_by == "agent"
    ) as episode:
        process = AgentProcess(
            command, {"OPENAI_BASE_URL": gateway.url, "OPENAI_API_KEY": episode.key, "OPENAI_MODEL": model}
        )
        try:
            code = await process.run(_given(session, row))
        except OSError as error:
            raise PluginError(f"the agent could not be started: {error}") from None
    words = f": {process.last_words}" if process.last_words else ""
    if code < 0:
        raise WorldLostError(f"the agent was killed by signal {-code}{words}")
    if code > 0:
        if episode.is_full:
            raise ContextFullError(f"the agent ended with code {code} after its context was full")
        raise PluginError(f"the agent exited with code {code}{words}")
    if not session.turn:
        refused = f"; its last call was refused: {episode.refused}" if episode.refused else ""
        raise PluginError(f"the agent ended before the policy had a turn; it must call OPENAI_BASE_URL{refused}")
    if scored_by == "reward":
        return BY_REWARD
    return None if session.rewards else _reward(process.last_line)


def _given(session: Session, row: Row) -> bytes:
    """What the agent reads: the row as one line of JSON, with the messages as the policy would be sent them."""
    fields = {
        **row.fields,
        "id": row.id,
        "capability": row.capability,
        "messages": messages_json(session.messages),
        "answer": row.answer,
        "seed": session.seed,
        "tools": session.tools,
    }
    return msgspec.json.encode(fields) + b"\n"


def _reward(line: str) -> RewardResult:
    """The reward in the last line of the output. Raises PluginError if there is none."""
    try:
        paid = msgspec.json.decode(line, type=float | _Paid)
    except msgspec.DecodeError:
        raise PluginError(
            f"the agent gave no reward: the last line of its output is {line[:200]!r}; it must be a number or "
            '{"reward": number}, or the agent posts {"reward": number} to OPENAI_BASE_URL/reward'
        ) from None
    return RewardResult(paid) if isinstance(paid, float) else RewardResult(paid.reward, paid.parts, paid.reason)
