"""Reads the calls of tools in a turn of the policy, by vLLM's own parsers, and checks them against the tools.

A call that cannot be read, of a tool that there is not, or with arguments that its schema refuses, is a `problem`: the
policy is told, and may try again.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from posttrain.compat.vllm_parsers import tool_parsers
from posttrain.data.templates import chat_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import ConfigError
from posttrain.records import ToolCall

# What a chat template writes around a call, and vLLM's parser of that form. The first that a template holds counts.
FORMS = (
    ("<function=", "qwen3_xml"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_start|>", "llama4_pythonic"),
    ("<|python_tag|>", "llama3_json"),
)
# How a turn begins that tries to call, by parser. A turn that does and has no call that can be read is malformed.
_TRIES = {
    "qwen3_xml": re.compile(r"<tool_call>|<function="),
    "hermes": re.compile(r"<tool_call>"),
    "mistral": re.compile(r"\[TOOL_CALLS\]"),
    "llama4_pythonic": re.compile(r"<\|python_start\|>|\A\s*\[\s*\w+\("),
    "pythonic": re.compile(r"\A\s*\[\s*\w+\("),
    "llama4_json": re.compile(r"<\|python_start\|>|\A\s*\{\s*\"(name|type)\""),
    "llama3_json": re.compile(r"<\|python_tag\|>|\A\s*\{\s*\"(name|type)\""),
}


@dataclass(frozen=True, slots=True)
class ReadTurn:
    """A turn of the policy. content: without its calls. problem: why a call in it is refused; "" if none is."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    problem: str = ""


def without_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the texts that end a turn."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def parser_of(tokenizer: Tokenizer, asked: str | None) -> str:
    """The name of the parser: the one that the config asks for, or the one that goes with the chat template. Raises
    ConfigError if vLLM has no such parser, or the template tells none. It does not import vLLM."""
    known = tool_parsers()
    name = asked or next((name for mark, name in FORMS if mark in chat_template(tokenizer)), None)
    if name not in known:
        got = f"got {name!r}, which vLLM has no parser of" if name else "the chat template does not tell how calls look"
        raise ConfigError("environment.tool_parser", [f"{got}; name one: {', '.join(known)}"])
    return name


class CallReader:
    """Reads calls of `tools`. parser: a name of vLLM's. Raises ConfigError if it does not fit the tokenizer.

    numbers: of the calls, for their ids. is_strict: whether a call of an unknown tool, or with arguments that its
    schema refuses, is a problem; otherwise only one that cannot be read is.
    """

    def __init__(
        self,
        parser: str,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        numbers: Iterator[int] | None = None,
        is_strict: bool = True,
    ):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)  # a malformed call is no event
        self._name = parser
        self._tokenizer = tokenizer
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        fields: dict[str, Any] = {"messages": [], "model": "", "tools": [dict(tool) for tool in tools]}
        self._request = ChatCompletionRequest.model_validate(fields)
        make: Any = ToolParserManager.get_tool_parser(parser)
        try:
            self._parser = make(tokenizer, self._request.tools)
        except (RuntimeError, ValueError) as error:
            raise ConfigError("environment.tool_parser", [f"got {parser!r}: {error}; name another parser"]) from None
        self._numbers = numbers or count(1)
        self._is_strict = is_strict

    def read(self, token_ids: Sequence[int], text: str) -> ReadTurn:
        """Read a turn. token_ids: without the token that ends it. text: without special tokens."""
        raw = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        tries = _TRIES.get(self._name)
        found = self._parser.extract_tool_calls(raw, self._request)
        if not found.tools_called or not found.tool_calls:
            problem = "the call cannot be read" if tries is not None and tries.search(raw) else ""
            return ReadTurn(text, problem=problem)
        calls, problems = [], []
        for call in found.tool_calls:
            arguments, problem = self._arguments(call.function.name, call.function.arguments)
            # An id that is the same whenever this episode is made again; Mistral's have 9 signs.
            calls.append(ToolCall(call.function.name, arguments, f"call{next(self._numbers):05d}"))
            problems += [problem] if problem else []
        return ReadTurn((found.content or "").strip(), tuple(calls), "; ".join(problems))

    def _arguments(self, name: str, text: str) -> tuple[dict[str, Any], str]:
        from jsonschema import Draft202012Validator

        try:
            arguments = json.loads(text)
        except ValueError as error:
            return {}, f"the arguments of {name} are no JSON: {error}"
        if not isinstance(arguments, dict):
            return {}, f"the arguments of {name} must be an object"
        if not self._is_strict:
            return arguments, ""
        if name not in self._schemas:
            return arguments, f"there is no tool {name!r}; there are: {', '.join(self._schemas)}"
        error = next(iter(Draft202012Validator(self._schemas[name]).iter_errors(arguments)), None)
        return arguments, f"the arguments of {name}: {error.message[:300]}" if error is not None else ""
