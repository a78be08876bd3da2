"""An episode whose policy follows a script: for the tests of an environment, without a model, an engine or a process.

The session is the real one, so what it refuses in a run it refuses here too. Left out: the deadline, the limits of an
environment process, and the reading of calls from text, so a script gives the calls themselves.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.environments import EnvironmentFunctionConfig
from posttrain.episodes.session import ContextFullError, Session, episode_result
from posttrain.episodes.toolbox.toolbox import Toolbox, ToolKit
from posttrain.episodes.tools import environment_provided, environment_tools
from posttrain.episodes.wire import Ask, Begin, Full, PolicyTurn, Saved, Told
from posttrain.records import Message, RewardResult, Row
from posttrain.scoring.plugins.lookup import ENVIRONMENT, check_environment, resolve
from posttrain.scoring.plugins.target import import_target

TOKENS_LEFT = 100_000


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """An episode that has ended. result: with the rewards of its turns; None if it is left to the stage's `reward`.
    messages: the prompt and all turns. rewards: (turn, value) of each call of `Session.reward`."""

    result: RewardResult | None
    messages: tuple[Message, ...]
    rewards: tuple[tuple[int, float], ...]


def rehearse(
    name: str,
    row: Row,
    said: Sequence[str | PolicyTurn],
    *,
    args: Mapping[str, Any] | None = None,
    tools: Sequence[str | dict[str, Any]] = (),
) -> Rehearsal:
    """Run an environment with a policy that says `said`, one after the other; after the last its context is full.

    name, args, tools: of the environment, as in the YAML. Raises PluginError for an environment that is wrong or
    returns no number, and whatever the environment raises.

    Example: `rehearse("calculator", row, [PolicyTurn("", (ToolCall("calculate", {"expression": "6 * 7"}),)), "42"])`.
    """
    check_environment(name, args)
    module, function = import_target(resolve(name, ENVIRONMENT), "environment")
    run_it: Any = function
    script = iter(said)

    def answer(message: Ask | Saved) -> None:
        if isinstance(message, Saved):
            return
        turn = next(script, None)
        if turn is None:
            session.take(Full(0))
            return
        if isinstance(turn, str):
            turn = PolicyTurn(turn, num_tokens=len(turn))
        session.take(Told(0, turn, (Message("assistant", turn.text, turn.tool_calls),), TOKENS_LEFT))

    known = EnvironmentFunctionConfig(name=name, args=dict(args or {}), tools=list(tools) or None)
    toolbox = Toolbox(ToolKit(environment_provided(known), beside=module))
    begin = Begin(0, name, None, row.messages, environment_tools(known), 0, TOKENS_LEFT)
    session = Session(begin, answer, lambda _: None, toolbox=toolbox)

    async def run() -> RewardResult | None:
        try:
            return episode_result(await run_it(session, row, **(args or {})), session)
        except ContextFullError:
            return episode_result(None, session, is_full=True)
        finally:
            await toolbox.close()

    result = asyncio.run(run())
    return Rehearsal(result, tuple(session.messages), tuple(session.rewards))
