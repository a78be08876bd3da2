"""Preference pairs: one prompt with a reply to prefer and a reply to reject.

Read from {"prompt", "chosen", "rejected"} rows, each field text or a list of messages. `chosen` and `rejected` may
also be whole conversations that begin with the same turns; then `prompt` may be left out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.shared import DataConfig
from posttrain.data.files import Record
from posttrain.data.messages import RowError, messages_to_json, shown
from posttrain.data.rows import Data, check, collect, take_capability, take_id, take_turns
from posttrain.data.turns import check_turns, check_usable
from posttrain.files import write_jsonl
from posttrain.records import Message


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference. `prompt` ends with a user or tool turn; `chosen` and `rejected` are replies, which differ."""

    id: str
    capability: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[Message, ...]:
        """Every turn: those of the prompt, then both replies."""
        return (*self.prompt, Message("assistant", self.chosen), Message("assistant", self.rejected))


def load_pairs(data: Data, *, limit: int | None = None, stage: str | None = None) -> list[Pair]:
    """Read and validate preference pairs; `stage` and what is raised are as in `load_rows`."""
    return collect(data, _parser(stage), limit, identity=lambda pair: pair.id)


def check_pairs(data: Data, rows: int = 100, *, stage: str | None = None) -> list[str]:
    """Problems in the first pairs, one line each."""
    return check(data, _parser(stage), rows, identity=lambda pair: pair.id)


def _parser(stage: str | None) -> Callable[[Record, DataConfig], Pair]:
    def parse(record: Record, config: DataConfig) -> Pair:
        pair = _parse(record, config)
        if stage is not None:
            check_usable(pair.prompt, pair.fields, name="prompt", stage=stage)
        return pair

    return parse


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSON lines, atomically. Returns how many."""
    return write_jsonl(path, (pair_to_json(pair) for pair in pairs))


def pair_to_json(pair: Pair) -> dict[str, Any]:
    """The JSON object that `load_pairs` reads back as an equal pair."""
    return {
        **pair.fields,
        "id": pair.id,
        "capability": pair.capability,
        "prompt": messages_to_json(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def _parse(record: Record, config: DataConfig) -> Pair:
    value = dict(record.value)
    for name in ("chosen", "rejected"):
        if value.get(name) is None:
            raise RowError(f"no {name!r}: a pair has 'prompt', 'chosen' and 'rejected'")
    given = take_turns(value, "prompt", "user") if value.get("prompt") is not None else ()
    chosen_start, chosen = _take_reply(value, "chosen")
    rejected_start, rejected = _take_reply(value, "rejected")
    prompt = _shared_prompt(given, chosen_start, rejected_start)
    check_turns(prompt, "prompt", "prompt")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same text: a pair must show a difference")
    identity, capability = take_id(value, record), take_capability(value, config.capability)
    return Pair(identity, capability, prompt, chosen, rejected, value)


def _take_reply(value: dict[str, Any], name: str) -> tuple[tuple[Message, ...], str]:
    """Remove a reply; returns the turns before it (if it was a whole conversation) and its text."""
    turns = take_turns(value, name, "assistant")
    if turns[-1].role != "assistant":
        raise RowError(f"{name}: the last turn is {turns[-1].role!r}: a reply must end with 'assistant'")
    reply = turns[-1]
    if reply.tool_calls:
        raise RowError(f"{name}: the reply has tool_calls: the two replies of a pair are compared as text only")
    if not isinstance(reply.content, str):
        raise RowError(f"{name}: the reply has an image: the two replies of a pair are compared as text only")
    if reply.trained is False:
        raise RowError(f"{name}: got train {shown(reply.trained)} (or weight 0): both replies of a pair are trained on")
    return turns[:-1], reply.text


def _shared_prompt(
    given: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[Message, ...]:
    """The prompt, from the field of that name or from the turns that both replies begin with."""
    if chosen != rejected:
        raise RowError("chosen and rejected do not begin with the same turns: a pair has one prompt")
    prompt = chosen or given
    if not prompt:
        raise RowError("no 'prompt': a pair has 'prompt', 'chosen' and 'rejected'")
    if given and chosen and given[-1] != chosen[-1]:
        raise RowError("'prompt' is not the prompt that chosen and rejected begin with; leave one of them out")
    return prompt
