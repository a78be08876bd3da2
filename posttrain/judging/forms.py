"""The forms of request that ask a server for exactly one label, and the reading of its answer.

Servers support different parameters, so there are four forms. preflight.py tries them in this order, the best first:

    choice + log-probabilities    the server allows the labels only (`structured_outputs` of vLLM)
    log-probabilities             any answer, with the likeliest first tokens
    json                          a JSON object that a schema constrains (`response_format`); no log-probabilities
    text                          any answer

Only an answer that is exactly one label becomes a verdict. If the answer has log-probabilities, they give the
distribution over all labels; otherwise the label gets a probability of 1. Prose, an empty answer and an unknown label
are undecided.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from posttrain.judging.verdicts import Undecided, Verdict, sure_verdict, verdict_of
from posttrain.records import Outcome

# A distribution counts only if the probability that cannot be assigned to one label is at most this share.
OPEN_MASS = 0.005
_ROOM_TOKENS = 16


@dataclass(frozen=True)
class Form:
    """A form of request. name: its name in events. choice, as_json: how the answer is constrained. logprobs: whether
    log-probabilities are requested.
    """

    name: str
    choice: bool = False
    as_json: bool = False
    logprobs: bool = False


FORMS = (
    Form("choice with log-probabilities", choice=True, logprobs=True),
    Form("log-probabilities", logprobs=True),
    Form("json", as_json=True),
    Form("text"),
)


def request_body(
    form: Form, model: str, text: str, *, labels: Sequence[str], top_logprobs: int, pictures: Sequence[str] = ()
) -> dict[str, Any]:
    """The body of a chat completion that asks for one label. pictures: data URLs, which stand before the text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    # A label never has more tokens than bytes.
    room = max(_ROOM_TOKENS, *(len(label.encode()) for label in labels))
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}],
        "temperature": 0,
        "max_tokens": room + (_ROOM_TOKENS if form.as_json else 0),
    }
    if form.logprobs:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    if form.choice:
        body["structured_outputs"] = {"choice": list(labels)}
    if form.as_json:
        schema = {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(labels)}},
            "required": ["label"],
            "additionalProperties": False,
        }
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": schema},
        }
    return body


# --- the answer; everything else in it is left alone ---


class _Alternative(Struct):
    token: str
    logprob: float


class _Token(Struct):
    token: str
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(Struct):
    content: list[_Token] | None = None


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    message: _Message
    logprobs: _Logprobs | None = None


class _Answer(Struct):
    choices: list[_Choice]


def read_answer(answer: object, form: Form, labels: Sequence[str]) -> Verdict | Undecided:
    """The verdict in the decoded body of a chat completion."""
    try:
        choice = msgspec.convert(answer, _Answer).choices[0]
    except msgspec.ValidationError as error:
        return Undecided(Outcome.ERROR, f"the answer is no chat completion: {error}")
    except IndexError:
        return Undecided(Outcome.ERROR, "the answer is no chat completion: `choices` is empty")
    text = (choice.message.content or "").strip()
    label = _label_in_json(text) if form.as_json else text
    if label not in labels:
        what = f"answered {text[:80]!r}, which is none of the labels" if text else "gave an empty answer"
        return Undecided(Outcome.ERROR, f"{what} ({', '.join(labels)})")
    tokens = (choice.logprobs.content or []) if choice.logprobs is not None else []
    first = next((token for token in tokens if _without_space(token.token)), None)
    if first is not None and first.top_logprobs:
        found = {item.token: item.logprob for item in reversed(first.top_logprobs)}
        if (logprobs := label_logprobs(found, labels)) is not None:
            return verdict_of(labels, logprobs)
    return sure_verdict(labels, label)


def _label_in_json(text: str) -> str:
    """The label in `{"label": "easy"}`, or an empty text."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    label = value.get("label") if isinstance(value, dict) and len(value) == 1 else None
    return label if isinstance(label, str) else ""


def _without_space(token: str) -> str:
    """A token's text without the mark of a leading space, which some servers do not decode."""
    return token.lstrip(" \t\r\n\u0120\u2581")


def label_logprobs(tokens: Mapping[str, float], labels: Sequence[str]) -> list[float] | None:
    """The log-probability of each label, from the likeliest first tokens; None if these leave too much unknown.

    tokens: {token: log-probability in nats}. The probability of a label is that of the longest token that begins this
    label and no other one; a token without a space before it is preferred. Two parts are unknown: the probability of a
    label without such a token, which is at most that of the least likely token given, and the probability of tokens
    that begin several labels. If they add up to more than OPEN_MASS of the known part, the result is None.
    """
    if any(math.isnan(value) for value in tokens.values()):
        return None
    best: dict[str, tuple[tuple[bool, int], float]] = {}
    shared = 0.0
    for token, logprob in tokens.items():
        core = _without_space(token)
        owners = [label for label in labels if core and label.startswith(core)]
        if len(owners) > 1:
            shared += math.exp(logprob)
        elif owners:
            rank = (token == core, len(core))
            if owners[0] not in best or rank > best[owners[0]][0]:
                best[owners[0]] = (rank, logprob)
    known = sum(math.exp(logprob) for _, logprob in best.values())
    missing = (len(labels) - len(best)) * math.exp(min(tokens.values(), default=0.0))
    if known <= 0 or (missing + shared) / known > OPEN_MASS:
        return None
    return [best[label][1] if label in best else -math.inf for label in labels]
