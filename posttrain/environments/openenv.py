"""Environments behind a server in the manner of OpenEnv: one session of its WebSocket for each episode.

    reset ──► observation ──► a turn of the policy ──► step ──► observation, reward, done ──► a turn ...

Source: the public protocol of openenv-core 0.2 (`/ws`: reset, step, close). It needs the package websockets; an
interpreter of its own has it: `posttrain environments install openenv`. Left out: starting the server, and its tools
over MCP.
"""

import json
from typing import Any

from posttrain.episodes.session import Session, WorldLostError
from posttrain.errors import PluginError
from posttrain.records import RewardResult, Row

PACKAGES = ["websockets==15.0.1"]
MAX_BYTES = 4 << 20  # of an observation


async def openenv(
    session: Session,
    row: Row,
    *,
    url: str,
    action: str = "",
    shown: str = "",
    first: bool = True,
    max_turns: int = 8,
) -> RewardResult:
    """Play one session of a server. Each reward of a step is that of the turn before it.

    url: of the server, such as http://127.0.0.1:8000. action: the field of an action that takes the text of a turn; ""
    reads the text as a JSON object. The arguments of a call of a tool are an action too. shown: the field of an
    observation that the policy reads; "" shows all fields as JSON. first: whether it reads the observation of the
    reset. max_turns: how many turns it has at most. The row's column `reset` holds arguments of the reset.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    address = url.rstrip("/").replace("http", "ws", 1) + "/ws"
    try:
        async with connect(address, max_size=MAX_BYTES, open_timeout=30) as server:
            given = {"seed": session.seed % 2**31, **(row.fields.get("reset") or {})}
            state = await _told(server, "reset", given)
            if first:
                await session.add("user", _text(state, shown))
            for left in range(max_turns - 1, -1, -1):
                turn = await session.sample()
                call = turn.tool_calls[0] if turn.tool_calls else None
                wanted = _action(turn.text, action) if call is None else dict(call.arguments)
                if wanted is None:
                    return RewardResult(0.0, reason="the turn is no JSON object")
                state = await _told(server, "step", wanted)
                session.reward(float(state.get("reward") or 0.0))
                if state.get("done"):
                    return RewardResult(0.0)
                if left and call is not None:
                    await session.add("tool", _text(state, shown), call_id=call.id, name=call.name)
                elif left:
                    await session.add("user", _text(state, shown))
    except (OSError, WebSocketException) as error:
        raise WorldLostError(f"the server at {url}: {error}") from None
    return RewardResult(0.0, reason=f"not done in {max_turns} turns")


async def _told(server: Any, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """What the server answers to a message. Raises PluginError for an error."""
    await server.send(json.dumps({"type": kind, "data": data}))
    answer = json.loads(await server.recv())
    if answer["type"] != "observation":
        raise PluginError(f"the server refuses a {kind}: {str(answer.get('data'))[:500]}")
    return answer["data"]


def _action(text: str, field: str) -> dict[str, Any] | None:
    if field:
        return {field: text.strip()}
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _text(state: dict[str, Any], shown: str) -> str:
    observation = state["observation"]
    if not shown:
        return json.dumps(observation, ensure_ascii=False)
    if shown not in observation:
        raise PluginError(f"the observation has no field {shown!r}; it has: {', '.join(observation)}")
    return str(observation[shown])
