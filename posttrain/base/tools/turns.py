"""The turns after a prompt, as JSON messages: calls, their results, and answers."""

import json
from collections.abc import Sequence
from typing import Any

ANSWER = "Answer:"
UNREADABLE = "Error: the call cannot be read"  # what the policy is told of a call that has no end


def schema(name: str, argument: str, description: str) -> dict[str, Any]:
    """The schema of a tool with one argument of text, in OpenAI's form."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def called(tool: dict[str, Any], value: str, result: str, *, number: int = 1) -> list[dict[str, Any]]:
    """A call of a tool that has one argument, and its result."""
    name, (argument,) = tool["function"]["name"], tool["function"]["parameters"]["properties"]
    call = {"id": f"call{number}", "type": "function", "function": {"name": name, "arguments": {argument: value}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": f"call{number}"},
    ]


def broken_call(tool: dict[str, Any], value: str) -> list[dict[str, Any]]:
    """A call without its closing bracket, and what the policy is then told."""
    text = written_call(tool["function"]["name"], {next(iter(tool["function"]["parameters"]["properties"])): value})
    return [{"role": "assistant", "content": text[:-1]}, {"role": "tool", "content": UNREADABLE}]


def written_call(name: str, arguments: dict[str, str]) -> str:
    """A call as Llama 4 writes it."""
    return f"[{name}({', '.join(f'{key}={json.dumps(value)}' for key, value in arguments.items())})]"


def answer(value: object) -> dict[str, Any]:
    """The last turn."""
    return said(f"{ANSWER} {value}")


def said(text: str) -> dict[str, Any]:
    """A turn of the policy without a call."""
    return {"role": "assistant", "content": text}


def heard(texts: Sequence[str], replies: Sequence[str]) -> list[dict[str, Any]]:
    """Turns of the policy, each but the last followed by a reply of the user."""
    turns = []
    for text, reply in zip(texts, replies, strict=True):
        turns += [said(text), {"role": "user", "content": reply}]
    return turns[:-1]
