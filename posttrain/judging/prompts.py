"""What the judge is asked about a row, as token ids, and which token stands for which label.

The text of a row is data that anyone may have written. It cannot leave its place in the judge's prompt: the special
tokens of the tokenizer and the tags of the template are escaped in it, and it is put in once, so that a placeholder
in it is left alone. The judge's answer is one token out of the labels', so there is no free text to be fooled by.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.chat import render_prompt
from posttrain.data.transcript import message_text, transcript
from posttrain.errors import DataError, UserError
from posttrain.judging.config import PLACEHOLDER, JudgeQuestion
from posttrain.records import Message, Row

_TAG = re.compile(r"</?\s*([A-Za-z][\w-]*)")
_GAP = "\n[...]\n"


class JudgePrompts:
    """Renders rows for the judge. `tokenizer` is the judge's, with a chat template."""

    def __init__(self, tokenizer: Any, config: JudgeQuestion):
        self._tokenizer = tokenizer
        self._config = config
        self._escape = _escaper(tokenizer, config.template)
        self.num_shortened = 0

    def render(self, row: Row) -> tuple[int, ...]:
        """Token ids of the judge's prompt for a row.

        A row too long for `max_prompt_tokens` is shown by the beginning and end of its texts, or raises DataError,
        as `long_rows` says.
        """
        texts = {name: self._escape(text) for name, text in row_texts(row).items()}
        ids = self._ids(texts)
        limit = self._config.prompt_limit
        if len(ids) <= limit:
            return ids
        if self._config.long_rows == "error":
            raise DataError(
                f"row {row.id}: the judge's prompt has {len(ids)} tokens, but at most {limit} fit (max_prompt_tokens, "
                "engine.max_model_len); raise them, shorten the row, or set long_rows: shorten"
            )
        self.num_shortened += 1
        return self._shorten(row, texts, limit)

    def _ids(self, texts: dict[str, str]) -> tuple[int, ...]:
        values = {**texts, "labels": ", ".join(self._config.labels)}
        text = PLACEHOLDER.sub(lambda match: values[match[1]], self._config.template)
        return tuple(render_prompt(self._tokenizer, [Message("user", text)]))

    def _shorten(self, row: Row, texts: dict[str, str], limit: int) -> tuple[int, ...]:
        """The prompt with every text cut to the largest number of characters, the same for each, that fits."""
        best: tuple[int, ...] | None = None
        low, high = 0, max(map(len, texts.values()))
        while low <= high:
            middle = (low + high) // 2
            ids = self._ids({name: _cut(text, middle) for name, text in texts.items()})
            if len(ids) <= limit:
                best, low = ids, middle + 1
            else:
                high = middle - 1
        if best is None:
            raise DataError(
                f"row {row.id}: the judge's template alone takes more than the {limit} tokens that fit; "
                "raise max_prompt_tokens and engine.max_model_len, or shorten template"
            )
        return best


def row_texts(row: Row) -> dict[str, str]:
    """The row's texts by placeholder: the prompt before its last reply, that reply, the system instruction, the answer.

    A prompt of several turns is a transcript with the role before each turn, calls of tools and their results too.
    """
    system = "\n".join(message.text for message in row.messages if message.role == "system")
    turns = [message for message in row.messages[:-1] if message.role != "system"]
    prompt = message_text(turns[0]) if len(turns) == 1 else transcript(turns)
    answer = "" if row.answer is None else str(row.answer)
    return {"prompt": prompt, "response": message_text(row.messages[-1]), "system": system, "answer": answer}


def label_token_ids(tokenizer: Any, labels: Sequence[str]) -> tuple[int, ...]:
    """The first token of each label as it appears right after the generation prompt, in the order of the labels.

    Raises UserError when two labels begin with the same token: a constrained choice could not tell them apart.
    """
    prompt = render_prompt(tokenizer, [Message("user", "?")])
    ids = [_first_token(tokenizer, prompt, label) for label in labels]
    owner: dict[int, str] = {}
    for token, label in zip(ids, labels, strict=True):
        if token in owner:
            raise UserError(
                f"labels: {owner[token]!r} and {label!r} both begin with the token {tokenizer.decode([token])!r} "
                "in the judge's tokenizer, so its answer could not be told apart; choose other words"
            )
        owner[token] = label
    return tuple(ids)


def _first_token(tokenizer: Any, prompt: list[int], label: str) -> int:
    """How `label` begins after `prompt`: some tokenizers mark a word differently at the start of a text. Where the two
    would merge into one token, a model that continues from `prompt` can only begin the label as it stands alone."""
    text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False) + label
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt)]
    return tokenizer(label, add_special_tokens=False)["input_ids"][0]


def _escaper(tokenizer: Any, template: str) -> Callable[[str], str]:
    """A function that makes special tokens, and tags of the names that the template uses, plain text."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    parts = [re.escape(token) for token in sorted(special, key=len, reverse=True) if token.strip()]
    tags = sorted(set(_TAG.findall(template)))
    if tags:
        parts.append(r"<(?=\s*/?\s*(?i:" + "|".join(map(re.escape, tags)) + r")\b)")
    if not parts:
        return lambda text: text
    pattern = re.compile("|".join(parts))
    return lambda text: pattern.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", text)


def _cut(text: str, length: int) -> str:
    """The beginning and the end of a text, at most `length` characters beside the mark of the gap."""
    if len(text) <= length:
        return text
    tail = length // 2
    return text[: length - tail] + _GAP + (text[-tail:] if tail else "")
