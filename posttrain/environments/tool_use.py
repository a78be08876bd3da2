"""Any tools: the policy may call those that the YAML names, before it answers."""

from collections.abc import Callable

from posttrain.episodes.session import Session
from posttrain.records import RewardResult, Row, ToolCall

REQUIRES = {"tool_use": ["answer"]}


async def tool_use(session: Session, row: Row, *, max_turns: int = 8, marker: str = "") -> RewardResult:
    """Have the tools of the YAML answer the policy's calls; 1 if its last turn is the row's answer.

    max_turns: how many turns the policy has at most. marker: the text after which the answer stands, such as "Answer:";
    "" compares the whole turn.
    """
    return await until_answer(session, row, None, max_turns=max_turns, marker=marker)


async def until_answer(
    session: Session, row: Row, result: Callable[[ToolCall], str] | None, *, max_turns: int, marker: str
) -> RewardResult:
    """Let the policy call tools until a turn has no call; 1 if that turn is the row's answer.

    result: of a call; None has the tools of the YAML give it. max_turns, marker: as of `tool_use`.
    """
    for _ in range(max_turns):
        turn = await session.sample()
        if not turn.tool_calls:
            return compare(turn.text, row, marker)
        if result is None:
            await session.call_tools(turn)
            continue
        for call in turn.tool_calls:
            await session.add("tool", result(call), call_id=call.id, name=call.name)
    return RewardResult(0.0, reason=f"no answer in {max_turns} turns")


def compare(text: str, row: Row, marker: str) -> RewardResult:
    """1 if a text is the row's answer, or if that stands behind the only `marker` in it."""
    said = text.rpartition(marker)[2] if marker else text
    right = said.strip() == str(row.answer).strip() and (not marker or text.count(marker) == 1)
    return RewardResult(float(right), reason="" if right else "wrong")
