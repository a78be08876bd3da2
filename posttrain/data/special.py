"""Encodes special tokens that occur in the text of a row as plain text, so that a row cannot forge a turn.

A tokenizer reads `<|im_end|>` as the token that ends a turn wherever it stands. So a row could end its own turn and
open another, such as a system turn. In all other respects the token ids must be those of `apply_chat_template`. Hence
three steps:

1. Each special token in the texts of the row is replaced by private-use Unicode characters (its cover) before the
   template is applied.
2. Every special token in the rendered text now comes from the template. Each is replaced by another private-use text
   (its private name).
3. The covers are replaced by the original text again. A copy of the tokenizer, in which the special tokens have their
   private names, encodes the result. For this copy `<|im_end|>` is plain text. Its rules for spaces, merges and
   normalisation are unchanged.

A cover is as long as the text that it replaces, so offsets in the text stay valid. Rows without special tokens skip
all this. Left out: chat formats that mark turns by plain words (`### Instruction:`), which no tokenizer can tell from
text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import DataError

# Special tokens that a reply may contain as tokens, such as <think>: they open no turn.
_REPLY_MARK = re.compile(
    r"\W*/?(?:begin_of_|end_of_)?(?:think(?:ing)?|thought|reasoning|solution|tool_calls?)\W*", re.I
)
_COVERS, _NAMES, _FILLER = 0xF0000, 0x100000, "\U000ffffd"
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")

_guards: "WeakKeyDictionary[Any, tuple[tuple[str, int], Guard]]" = WeakKeyDictionary()


def guard_of(tokenizer: Any, template: str) -> "Guard":
    """The guard of a tokenizer with this chat template. It is cached while the tokenizer lives."""
    key = (template, len(tokenizer))
    if (found := _guards.get(tokenizer)) is None or found[0] != key:
        found = _guards[tokenizer] = key, Guard(tokenizer, template)
    return found[1]


class Guard:
    """Finds the special tokens of a tokenizer in text, and encodes text that holds them.

    Special are the tokens that the tokenizer calls special, and the added tokens that its chat template writes. Tokens
    that a reply may contain, such as `<think>`, stay tokens in assistant turns.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        self._tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        special = {text for text, token in added.items() if token.special}
        framing = {text for text in added if text in template and re.fullmatch(r"\W.*\W", text)}
        tokens = special | {text for text in framing if not _REPLY_MARK.fullmatch(text)}
        self.tokens = sorted(tokens, key=lambda text: (-len(text), text))
        self._anywhere = _any_of(self.tokens)
        self._in_replies = _any_of([text for text in self.tokens if not _REPLY_MARK.fullmatch(text)])
        self._covers = {text: _private(_COVERS + place, text) for place, text in enumerate(self.tokens)}
        self._names = {text: _private(_NAMES + place, text) for place, text in enumerate(self.tokens)}
        self._originals = {cover: text for text, cover in self._covers.items()}
        self._copy: tuple[Any, dict[int, int]] | None = None

    def found_in(self, messages: Sequence[Mapping[str, object]], tools: Any = None) -> str | None:
        """The first special token in the texts of a conversation or its tools, or None."""
        return next(self._found(messages, tools), None)

    def _found(self, messages: Sequence[Mapping[str, object]], tools: Any) -> Iterator[str]:
        for message in messages:
            for key, value in message.items():
                if key != "role":
                    yield from (match[0] for text in _texts(value) if (match := self._pattern(message).search(text)))
        yield from (match[0] for text in _texts(tools) if (match := self._anywhere.search(text)))

    def _pattern(self, message: Mapping[str, object]) -> re.Pattern[str]:
        return self._in_replies if message["role"] == "assistant" else self._anywhere

    def cover(self, messages: Sequence[Mapping[str, object]], tools: Any) -> tuple[list[dict[str, Any]], Any]:
        """The conversation and its tools, with every special token in their texts replaced by its cover."""
        if any(_PRIVATE.search(text) for value in (list(messages), tools) for text in _texts(value)):
            raise DataError(
                "the text holds a special token and private characters (U+F0000 and above), so it cannot be encoded as "
                "text; remove either"
            )
        covered = [{**self._covered(message, self._pattern(message)), "role": message["role"]} for message in messages]
        return covered, self._covered(tools, self._anywhere)

    def _covered(self, value: object, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: self._covers[match[0]], value)
        if isinstance(value, Mapping):
            return {self._covered(key, pattern): self._covered(item, pattern) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._covered(item, pattern) for item in value]
        return value

    def encode(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a rendered text, and the offsets (start, end) of each token in that text.

        rendered: the template's output for a covered conversation. Raises `DataError` if the template changed a cover,
        or if the tokenizer cannot be copied.
        """
        named = self._anywhere.sub(lambda match: self._names[match[0]], rendered)
        text = _any_of(list(self._originals)).sub(lambda match: self._originals[match[0]], named)
        if _PRIVATE.search(_any_of(list(self._names.values())).sub("", text)):
            raise DataError("the chat template cuts or rewrites the special tokens in the text of the row; remove them")
        if self._copy is None:
            self._copy = self._renamed()
        copy, ids = self._copy
        encoding = copy.encode(text, add_special_tokens=False)
        numbers: list[int] = encoding.ids
        return [ids.get(token, token) for token in numbers], list(encoding.offsets)

    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer whose special tokens have private names, and {id in the copy: original id}."""
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self._tokenizer).__name__} cannot encode the special tokens in the text of the row as text; "
                "use a tokenizer with a tokenizer.json, or remove them"
            )
        from tokenizers import Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        content.update(truncation=None, padding=None)
        for token in content["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = content["model"]
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {self._names.get(text, text): number for text, number in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[self._names.get(text, text), score] for text, score in vocab]
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        copy: Any = Tokenizer.from_str(json.dumps(content))
        ids = {
            copy.token_to_id(name): self._tokenizer.convert_tokens_to_ids(text) for text, name in self._names.items()
        }
        # An added token that kept its name may have another id in the copy: the renamed tokens before it are new words.
        for text, number in self._tokenizer.get_added_vocab().items():
            if text not in self._names:
                ids[copy.token_to_id(text)] = number
        return copy, ids


def apply_guarded(
    tokenizer: Tokenizer, guard: Guard, messages: Sequence[Mapping[str, object]], *, tools: Any = None,
    return_assistant_tokens_mask: bool = False, **options: object,
) -> Mapping[str, object]:  # fmt: skip
    """`tokenizer.apply_chat_template` for a conversation that holds special tokens, which are encoded as plain text.

    Returns {"input_ids"}, and "assistant_masks" if `return_assistant_tokens_mask`. Raises what `Guard.encode` raises.
    """
    messages, tools = guard.cover(messages, tools)
    rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    ids, places = guard.encode(rendered)
    if not return_assistant_tokens_mask:
        return {"input_ids": ids}
    covered = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True}, **options,
    )  # fmt: skip
    runs: list[tuple[int, int]] = []  # (start, end) in the text of each part that generation markers enclose
    before = 0
    for bit, (start, end) in zip(covered["assistant_masks"], covered["offset_mapping"], strict=True):
        if bit:
            runs = [*runs[:-1], (runs[-1][0], end)] if before else [*runs, (start, end)]
        before = bit
    masks = [int(any(first <= start and end <= last for first, last in runs)) for start, end in places]
    return {"input_ids": ids, "assistant_masks": masks}


def encode_text(tokenizer: Tokenizer, guard: Guard, text: str) -> list[int]:
    """Token ids of a text, with special tokens encoded as plain text."""
    messages = [{"role": "text", "content": text}]
    if guard.found_in(messages) is None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return guard.encode(guard.cover(messages, None)[0][0]["content"])[0]


def special_token_problem(name: str, token: str) -> str:
    """The error text for a row whose text holds a special token, for `special_tokens_in_text: refuse`."""
    return (
        f"{name}: its text holds the special token {token!r}; remove it, or set special_tokens_in_text: encode, which "
        "makes it plain text"
    )


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, preferring longer ones. Without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _private(first: int, text: str) -> str:
    return chr(first) + _FILLER * (len(text) - 1)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
