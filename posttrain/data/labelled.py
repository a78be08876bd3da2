"""Single replies that are marked as good or bad, as in datasets for KTO, and how they are joined."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.messages import messages_to_json
from posttrain.errors import DataError
from posttrain.records import Message, ToolCall


@dataclass(frozen=True, slots=True)
class Labelled:
    """One reply to a prompt, and whether it is good. fields: the row's other columns. reply_calls: its tool calls."""

    id: str
    capability: str
    prompt: tuple[Message, ...]
    reply: str
    good: bool
    fields: Mapping[str, Any] = field(default_factory=dict)
    reply_calls: tuple[ToolCall, ...] = ()

    @property
    def replies(self) -> tuple[Message]:
        """The reply as a turn."""
        return (Message("assistant", self.reply, self.reply_calls),)

    @property
    def turns(self) -> tuple[Message, ...]:
        """Every turn: those of the prompt, then the reply."""
        return (*self.prompt, *self.replies)


def joined(items: Sequence[Labelled]) -> Iterator[tuple[Labelled, Labelled]]:
    """A good and a bad reply to the same prompt, until each reply is used.

    Of an item, its place and a hash of its prompt are in memory. Raises `DataError` for a prompt whose good and bad
    replies differ in number, or where one reply is both.
    """
    by_prompt: dict[bytes, tuple[array[int], array[int]]] = {}  # hash of it -> places of its bad and good replies
    for place, item in enumerate(items):
        text = json.dumps(messages_to_json(item.prompt), sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        by_prompt.setdefault(key, (array("q"), array("q")))[item.good].append(place)
    alone = [group for group in by_prompt.values() if len(group[0]) != len(group[1])]
    if alone:
        bad, good = alone[0]
        raise DataError(
            f"{len(alone)} of {len(by_prompt)} prompts do not have as many replies with label true as with label false "
            f"({items[(good or bad)[0]].id!r} has {len(good)} and {len(bad)}), so they make no pairs; add or remove "
            "replies"
        )
    for bad, good in by_prompt.values():
        for rejected, chosen in ((items[one], items[other]) for one, other in zip(bad, good, strict=True)):
            if chosen.replies == rejected.replies:
                raise DataError(f"{chosen.id!r} and {rejected.id!r}: the same reply has label true and label false")
            yield chosen, rejected
