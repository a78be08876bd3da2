"""Makes the judge's question about a row, and finds the token that stands for each label.

The text of a row is not trusted: it must not be able to imitate another part of the judge's prompt. So special tokens
and the template's tags are escaped in it. All texts are put into the template in one pass, so a placeholder in the text
of a row is not replaced. For a judge on engines the special tokens are those of its tokenizer, and lengths are counted
in tokens. The tokenizer of a judge at an endpoint is unknown, so whatever looks like a special token is escaped, and
lengths are counted in characters.
"""

import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from posttrain.data.chat import render_prompt
from posttrain.data.images.render import Pictures, pictures_of, prompt_with_pictures
from posttrain.data.images.section import pictures_for
from posttrain.data.images.store import ImageStore
from posttrain.data.special import guard_of
from posttrain.data.templates import chat_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.transcript import message_text, transcript
from posttrain.errors import DataError, UserError
from posttrain.judging.config import PLACEHOLDER, EndpointConfig, JudgeQuestion
from posttrain.model.adapter import base_folder
from posttrain.records import ContentPart, ImagePart, Message, Row, TextPart

_TAG = re.compile(r"</?\s*([A-Za-z][\w-]*)")
_SHOWN = 20
_GAP = "\n[...]\n"
# The first character of what common chat formats use as special tokens: <|eot|>, <turn|>, </s>, <start_of_turn>,
# [/INST], <<SYS>>. Some models write the bar in full width.
_LOOKS_SPECIAL = (
    r"<(?=[|\uff5c])|<(?=/?\w{1,40}[|\uff5c]>)|<(?=</?SYS>>)"
    r"|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)


class Question(Struct, frozen=True):
    """A question to the judge about one row.

    row_id: the row's id. text: the text of the judge's user turn. token_ids: the whole prompt, for a judge on engines
    only. pictures: references to the pictures of the row, which the user turn shows before the text.

    Example: Question("r7", "Rate how hard a task is ... <task_text>1 + 1?</task_text> ...", (200000, 5, ...))
    """

    row_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    pictures: tuple[str, ...] = ()


class JudgePrompts:
    """Renders rows for the judge.

    tokenizer: the judge's, with a chat template; None for a judge at an endpoint. choice_ids: the first token of each
    label, empty without a tokenizer. num_shortened: rows of which only the beginning and end were shown. store: of the
    rows' pictures, which the judge is shown; None for a judge that reads text. Raises UserError for labels that the
    tokenizer cannot tell apart, and for a model folder that takes no pictures.
    """

    def __init__(self, config: JudgeQuestion, tokenizer: Any = None, *, store: ImageStore | None = None):
        self._config = config
        self._tokenizer = tokenizer
        self._store = store
        self._pictures: Pictures | None = None
        if not isinstance(config.source, EndpointConfig):
            self._pictures = pictures_for(store, base_folder(config.source.path), tokenizer)
        self._special = _special_pattern(tokenizer)
        self._escape = _escaper(self._special, config.template)
        self.choice_ids = () if tokenizer is None else label_token_ids(tokenizer, config.labels)
        self.num_shortened = 0

    def render(self, row: Row) -> Question:
        """The question about a row, whose last message is the reply.

        A row that is too long is shortened to the beginning and end of its texts, or raises DataError, depending on
        `long_rows`.
        """
        texts = {name: self._escape(text) for name, text in row_texts(row).items()}
        question, length = self._question(row, texts)
        limit = self._config.prompt_limit
        if length <= limit:
            return question
        unit, keys = self._words()
        if self._config.long_rows == "error":
            raise DataError(
                f"row {row.id}: the judge's prompt has {length} {unit}, but at most {limit} fit ({keys}); raise that, "
                "shorten the row, or set long_rows: shorten"
            )
        self.num_shortened += 1
        return self._shorten(row, texts, limit)

    def special_token_in(self, row: Row) -> str | None:
        """A special token in the texts of a row (for an endpoint: text that looks like one); None if there is none."""
        for text in row_texts(row).values():
            if (match := self._special.search(text)) is not None:
                return match[0] if self._tokenizer is not None else text[match.start() : match.start() + _SHOWN]
        return None

    def _words(self) -> tuple[str, str]:
        """The unit of lengths, and the keys that limit them."""
        if isinstance(self._config.source, EndpointConfig):
            return "characters", "endpoint.max_prompt_chars"
        return "tokens", "max_prompt_tokens and engine.max_model_len"

    def _question(self, row: Row, texts: dict[str, str]) -> tuple[Question, int]:
        """The question with these texts in the template, and its length."""
        values = {**texts, "labels": ", ".join(self._config.labels)}
        text = PLACEHOLDER.sub(lambda match: values[match[1]], self._config.template)
        keys = () if self._store is None else pictures_of(row.messages)
        shown = tuple(self._store.reference(key) for key in keys) if self._store is not None else ()
        if self._tokenizer is None:
            return Question(row.id, text, pictures=shown), len(text)
        if keys and self._pictures is not None:
            turn = Message("user", (*map(ImagePart, keys), TextPart(text)))
            store, rule = self._pictures.store, self._pictures.rule
            ids = prompt_with_pictures(self._tokenizer, [turn], store, rule=rule).ids
        else:
            ids = render_prompt(self._tokenizer, [Message("user", text)])
        return Question(row.id, text, tuple(ids), shown), len(ids)

    def _shorten(self, row: Row, texts: dict[str, str], limit: int) -> Question:
        """The question with every text cut to the largest number of characters, the same for each, that fits."""
        best: Question | None = None
        low, high = 0, max(map(len, texts.values()))
        while low <= high:
            middle = (low + high) // 2
            question, length = self._question(row, {name: _cut(text, middle) for name, text in texts.items()})
            if length <= limit:
                best, low = question, middle + 1
            else:
                high = middle - 1
        if best is None:
            unit, keys = self._words()
            least = self._question(row, {name: _cut(text, 0) for name, text in texts.items()})[1]
            raise DataError(
                f"row {row.id}: the judge's template alone takes {least} {unit}, of which {limit} fit; raise {keys}, "
                "or shorten template"
            )
        return best


def judge_prompts(config: JudgeQuestion, store: ImageStore | None = None) -> JudgePrompts:
    """The renderer for a judge, with its tokenizer unless the judge is at an endpoint. store: as for `JudgePrompts`."""
    if isinstance(config.source, EndpointConfig):
        return JudgePrompts(config, store=store)
    from posttrain.model.tokenizer import load_tokenizer

    return JudgePrompts(config, load_tokenizer(config.source.path, config.source.chat_template), store=store)


def row_texts(row: Row) -> dict[str, str]:
    """The row's texts by placeholder: the prompt before its last reply, that reply, the system instruction, the answer.

    A prompt of several turns is a transcript with the role before each turn, including tool calls and their results.
    Pictures are named by their number, such as [picture 2].
    """
    row = _numbered(row)
    system = "\n".join(message.text for message in row.messages if message.role == "system")
    turns = [message for message in row.messages[:-1] if message.role != "system"]
    prompt = message_text(turns[0]) if len(turns) == 1 else transcript(turns)
    answer = "" if row.answer is None else str(row.answer)
    return {"prompt": prompt, "response": message_text(row.messages[-1]), "system": system, "answer": answer}


def _numbered(row: Row) -> Row:
    """The row with a text in the place of each picture."""
    numbers = count(1)

    def named(part: ContentPart) -> ContentPart:
        return TextPart(f"[picture {next(numbers)}]") if isinstance(part, ImagePart) else part

    messages = (
        message if isinstance(message.content, str) else replace(message, content=tuple(map(named, message.content)))
        for message in row.messages
    )
    return replace(row, messages=tuple(messages))


def label_token_ids(tokenizer: Tokenizer, labels: Sequence[str]) -> tuple[int, ...]:
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


def _first_token(tokenizer: Tokenizer, prompt: list[int], label: str) -> int:
    """The first token of `label` after `prompt`. Some tokenizers encode a word differently at the start of a text.

    If the end of the prompt and the label would merge into one token, the first token of the label alone is taken,
    because a model that continues the prompt can only produce that one.
    """
    text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False) + label
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt)]
    return tokenizer(label, add_special_tokens=False)["input_ids"][0]


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches special tokens; without a tokenizer, the first character of what looks like one."""
    if tokenizer is None:
        return re.compile(_LOOKS_SPECIAL)
    return re.compile("|".join(map(re.escape, guard_of(tokenizer, chat_template(tokenizer)).tokens)) or "(?!)")


def _escaper(special: re.Pattern[str], template: str) -> Callable[[str], str]:
    """A function that makes special tokens, and tags of the names that the template uses, plain text."""
    parts = [special.pattern]
    tags = sorted(set(_TAG.findall(template)))
    if tags:
        parts.append(r"<(?=\s*/?\s*(?i:" + "|".join(map(re.escape, tags)) + r")\b)")
    pattern = re.compile("|".join(parts))
    return lambda text: pattern.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", text)


def _cut(text: str, length: int) -> str:
    """The beginning and the end of a text, at most `length` characters beside the mark of the gap."""
    if len(text) <= length:
        return text
    tail = length // 2
    return text[: length - tail] + _GAP + (text[-tail:] if tail else "")
