"""A small store in the row: the policy may look values up before it answers."""

from posttrain.environments.tool_use import until_answer
from posttrain.episodes.session import Session
from posttrain.records import RewardResult, Row, ToolCall

TOOLS = {
    "store": [
        {
            "type": "function",
            "function": {
                "name": "lookup",
                "description": "Return the value under a key.",
                "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
            },
        }
    ]
}
REQUIRES = {"store": ["answer", "store"]}


async def store(session: Session, row: Row, *, max_turns: int = 6, marker: str = "") -> RewardResult:
    """Look up what the policy asks for in the row's `store`, a mapping; 1 if its last turn is the row's answer.

    max_turns: how many turns the policy has at most. marker: the text after which the answer stands, such as "Answer:";
    "" compares the whole turn.
    """
    values = row.fields["store"]

    def value(call: ToolCall) -> str:
        return str(values.get(call.arguments["key"], "Error: no key"))

    return await until_answer(session, row, value, max_turns=max_turns, marker=marker)
