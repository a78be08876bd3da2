"""The conversations of one episode in which the policy has spoken, as a tree: each with the tokens of the policy.

A history is looked up by its messages. The longest part of it that ends with a turn of the policy, and was recorded,
goes on with the recorded tokens; only what follows is rendered. So a sampled token is never made from text again, and a
history that was edited shares what stands before the edit.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.conversation import Conversation
from posttrain.episodes.wire import History
from posttrain.errors import DataError
from posttrain.records import Message

_encode = msgspec.json.Encoder(order="sorted").encode


@dataclass(frozen=True, slots=True)
class Place:
    """Where the policy speaks next. ids: all that it reads. key: of its history."""

    key: bytes
    ids: tuple[int, ...]
    conversation: Conversation | None  # None for a bare prompt
    prompt: str | None = None


class Histories:
    """The histories of one episode. root: a conversation without messages, for the tools that are shown with it."""

    def __init__(self, tokenizer: Tokenizer, root: Callable[[Sequence[dict[str, Any]]], Conversation]):
        self._tokenizer = tokenizer
        self._root = root
        self._said: dict[bytes, tuple[Conversation, tuple[int, ...]]] = {}
        self._texts: dict[str, tuple[int, ...]] = {"": ()}

    def place(self, history: History) -> Place:
        """Where the history ends. Raises DataError if the chat template refuses its messages, or the model does not
        know a token."""
        if history.prompt is not None:
            text = history.prompt if isinstance(history.prompt, str) else None
            ids = tuple(history.prompt) if not isinstance(history.prompt, str) else self._ids_of(history.prompt)
            if not ids or (unknown := max(ids)) >= len(self._tokenizer):
                got = f"got the id {unknown}; there are {len(self._tokenizer)} tokens" if ids else "has no token"
                raise DataError(f"prompt: {got}")
            return Place(b"", ids, None, text)
        keys = [_digest(b"", list(history.tools))]
        for message in history.messages:
            keys.append(_digest(keys[-1], message))
        length = next((length for length in range(len(keys) - 1, 0, -1) if keys[length] in self._said), 0)
        before, ids = self._said[keys[length]] if length else (self._root(history.tools), ())
        conversation = before.fork()
        conversation.add(history.messages[length:])
        return Place(keys[-1], conversation.next(ids).after(ids), conversation)

    def note(self, place: Place, said: Message, token_ids: Sequence[int], *, num_ends: int) -> None:
        """Record what the policy said there. num_ends: how many of its last tokens only end the turn."""
        if place.conversation is not None:
            place.conversation.add_said(said)
            self._said[_digest(place.key, said)] = place.conversation, (*place.ids, *token_ids)
        elif place.prompt is not None:
            self._texts[place.prompt + said.text] = (*place.ids, *token_ids[: len(token_ids) - num_ends])

    def _ids_of(self, prompt: str) -> tuple[int, ...]:
        known = max((text for text in self._texts if prompt.startswith(text)), key=len)
        return (*self._texts[known], *self._tokenizer.encode(prompt[len(known) :], add_special_tokens=not known))


def _digest(before: bytes, item: Any) -> bytes:
    return hashlib.blake2b(before + _encode(item), digest_size=16).digest()
