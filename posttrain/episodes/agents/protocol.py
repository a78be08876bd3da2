"""The requests that the gateway takes and its answers, in the form of OpenAI's API.

A field that would change what the policy says, and cannot be followed, is refused; the run decides `top_p` and
penalties, and they are ignored like every unknown field.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from msgspec import Struct

from posttrain.episodes.wire import History, PolicyTurn
from posttrain.records import Message, ToolCall


class RefusedError(Exception):
    """A call that is answered with an error. status: of HTTP. code: OpenAI's word for it."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.code = code


class _Part(Struct):
    type: str
    text: str = ""


class _Function(Struct):
    name: str
    arguments: str = "{}"


class _ToolCall(Struct):
    function: _Function
    id: str | None = None


class _Message(Struct):
    """A message of a call. What clients add to the turns of the policy, and give back, is not read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def record(self) -> Message:
        """As our record. Raises RefusedError for what is no text, or no call."""
        parts = self.content if isinstance(self.content, list) else []
        if other := next((part.type for part in parts if part.type not in ("text", "refusal")), None):
            raise RefusedError(f"messages: got a part of type {other!r}; the policy reads text only")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        calls = tuple(
            ToolCall(call.function.name, _arguments(call.function), call.id) for call in self.tool_calls or ()
        )
        role = "system" if self.role == "developer" else self.role
        return Message(role, text, calls, self.tool_call_id, self.name)


def _arguments(function: _Function) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise RefusedError(
            f"messages: the arguments of {function.name} are {function.arguments[:80]!r}, no JSON object"
        )
    return arguments


class _StreamOptions(Struct):
    include_usage: bool = False


class _Call(Struct):
    """What calls of both kinds have in common."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logit_bias: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    def history(self) -> History:
        """All that the policy is to answer. Raises RefusedError for what cannot be followed."""
        raise NotImplementedError

    def _refuse(self, **wrong: object) -> None:
        for name, value in {"n": self.n not in (None, 1), "logit_bias": bool(self.logit_bias), **wrong}.items():
            if value:
                raise RefusedError(f"{name}: got {json.dumps(getattr(self, name))[:80]}; {_RULES[name]}")


_RULES = {
    "n": "one choice is sampled for a call; call again for another",
    "logit_bias": "the policy is sampled as the run says; leave it out",
    "tool_choice": "no call can be forced; use auto or none",
    "response_format": "no form can be forced; ask for it in the prompt",
    "top_logprobs": "only the sampled token has a log-probability; use 0",
    "logprobs": "only the sampled token has a log-probability; use 0 or 1",
    "prompt": "it must be one text, or one list of token ids",
    "best_of": "one choice is sampled for a call; call again for another",
    "echo": "the prompt is not given back; leave it out",
    "suffix": "the policy cannot fill in; leave it out",
    "functions": "write them as tools",
}


class ChatCall(_Call):
    """POST /v1/chat/completions."""

    messages: list[_Message] = []
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    functions: Any = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def history(self) -> History:
        form = (self.response_format or {}).get("type", "text")
        self._refuse(
            tool_choice=self.tool_choice not in (None, "auto", "none"),
            response_format=form != "text",
            top_logprobs=self.top_logprobs,
            functions=self.functions,
        )
        tools = () if self.tool_choice == "none" else tuple(self.tools or ())
        if not self.messages:
            raise RefusedError("messages: there is none")
        return History(tuple(message.record() for message in self.messages), tools)


class TextCall(_Call):
    """POST /v1/completions."""

    prompt: str | list[Any] = ""
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def history(self) -> History:
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]  # a list of prompts
        is_ids = isinstance(prompt, list) and all(isinstance(token, int) and token >= 0 for token in prompt)
        self._refuse(
            prompt=not prompt or not (isinstance(prompt, str) or is_ids),
            logprobs=(self.logprobs or 0) > 1,
            echo=self.echo,
            best_of=self.best_of not in (None, 1),
            suffix=self.suffix,
        )
        return History(prompt=prompt if isinstance(prompt, str) else tuple(prompt))


def messages_json(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, as an agent can send them."""
    return [_message_json(message) for message in messages]


def _message_json(message: Message) -> dict[str, Any]:
    optional = {
        "tool_calls": [_call_json(call) for call in message.tool_calls],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {"role": message.role, "content": message.text, **{name: value for name, value in optional.items() if value}}


# ---------------------------------------------------------------- answers


def chat_answer(turn: PolicyTurn, model: str, name: str) -> dict[str, Any]:
    """The body of a chat completion. name: its id."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text or None if turn.tool_calls else turn.text}
    if turn.tool_calls:
        message["tool_calls"] = [_call_json(call) for call in turn.tool_calls]
    choice = {"index": 0, "message": message, "finish_reason": _reason(turn), "logprobs": _chat_logprobs(turn)}
    return {**_head(name, "chat.completion", model), "choices": [choice], "usage": _usage(turn)}


def text_answer(turn: PolicyTurn, model: str, name: str) -> dict[str, Any]:
    """The body of a text completion."""
    choice = {"index": 0, "text": turn.text, "finish_reason": turn.finish_reason, "logprobs": _text_logprobs(turn)}
    return {**_head(name, "text_completion", model), "choices": [choice], "usage": _usage(turn)}


def chat_events(turn: PolicyTurn, model: str, name: str, *, with_usage: bool) -> Iterator[str]:
    """The same as server-sent events: the turn is sampled whole, and told in a few."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": turn.text}] if turn.text else []
    deltas += [{"tool_calls": [{"index": at, **_call_json(call)}]} for at, call in enumerate(turn.tool_calls)]
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    if turn.tokens:
        choices[-1]["logprobs"] = _chat_logprobs(turn)
    choices.append({"index": 0, "delta": {}, "finish_reason": _reason(turn)})
    yield from _events(choices, _head(name, "chat.completion.chunk", model), turn, with_usage=with_usage)


def text_events(turn: PolicyTurn, model: str, name: str, *, with_usage: bool) -> Iterator[str]:
    """A text completion as server-sent events."""
    (choice,) = text_answer(turn, model, name)["choices"]
    yield from _events([choice], _head(name, "text_completion", model), turn, with_usage=with_usage)


def _events(
    choices: list[dict[str, Any]], head: dict[str, Any], turn: PolicyTurn, *, with_usage: bool
) -> Iterator[str]:
    bodies = [{**head, "choices": [choice]} for choice in choices]
    bodies += [{**head, "choices": [], "usage": _usage(turn)}] if with_usage else []
    for body in bodies:
        yield f"data: {json.dumps(body)}\n\n"
    yield "data: [DONE]\n\n"


def _head(name: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _call_json(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": call.id, "type": "function", "function": function}


def _reason(turn: PolicyTurn) -> str:
    return "tool_calls" if turn.tool_calls else turn.finish_reason


def _usage(turn: PolicyTurn) -> dict[str, int]:
    total = turn.num_read + turn.num_tokens
    return {"prompt_tokens": turn.num_read, "completion_tokens": turn.num_tokens, "total_tokens": total}


def _chat_logprobs(turn: PolicyTurn) -> dict[str, Any] | None:
    if not turn.tokens:
        return None
    content = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logprob in turn.tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(turn: PolicyTurn) -> dict[str, Any] | None:
    if not turn.tokens:
        return None
    tokens, logprobs = [token for token, _ in turn.tokens], [logprob for _, logprob in turn.tokens]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}
