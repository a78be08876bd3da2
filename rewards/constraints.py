"""The constraints of the reward `instructions`. Each is a function of the reply's text and the constraint's value.

Source: IFEval, arXiv 2311.07911, whose verifiable instructions these follow. Left out: its checks of the language, for
which a model would have to guess.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)")
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|(?<!\*)\*[^\s*][^\n*]*\*(?!\*)")


def loose_variants(text: str) -> list[str]:
    """The texts of IFEval's loose check: the reply, and the reply without its first line, last line, both, or stars."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys([variant for part in cut for variant in (part, part.replace("*", ""))]))


def _count_words(text: str) -> int:
    return len(text.split())


def _sentences(text: str) -> int:
    return len(_SENTENCE.findall(text))


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip())


def _occurrences(text: str, phrase: str) -> int:
    """How often the phrase occurs as whole words, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _phrases(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(phrase) for phrase in value]


def _same_case(text: str, wanted: bool, cased: str) -> bool:
    """Whether the text has letters and equals `cased`. With `wanted: false`, the opposite."""
    return (any(letter.isalpha() for letter in text) and text == cased) == bool(wanted)


def _is_json(text: str) -> bool:
    block = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return False
    return True


def _capital_words(text: str) -> int:
    return sum(word.isupper() and any(map(str.isalpha, word)) for word in re.findall(r"[^\W_]+", text))


def _each(text: str, value: Any, count: Callable[[str, str], int], *, least: bool) -> bool:
    """Whether each of a mapping's keys occurs at least, or at most, as often as its value says."""
    return all(count(text, key) >= number if least else count(text, key) <= number for key, number in value.items())


def _letters(text: str, letter: str) -> int:
    return text.casefold().count(letter.casefold())


CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "max_words": lambda text, value: _count_words(text) <= value,
    "min_words": lambda text, value: _count_words(text) >= value,
    "max_sentences": lambda text, value: _sentences(text) <= value,
    "min_sentences": lambda text, value: _sentences(text) >= value,
    "max_chars": lambda text, value: len(text) <= value,
    "min_chars": lambda text, value: len(text) >= value,
    "num_lines": lambda text, value: sum(bool(line.strip()) for line in text.split("\n")) == value,
    "num_paragraphs": lambda text, value: len(_paragraphs(text)) == value,
    "paragraph_starts_with": lambda text, value: all(
        0 < int(number) <= len(_paragraphs(text))
        and _paragraphs(text)[int(number) - 1].casefold().startswith(str(word).casefold())
        for number, word in value.items()
    ),
    "num_sections": lambda text, value: len(re.findall(r"^#{1,6}\s+\S", text, re.MULTILINE)) == value,
    "bullet_count": lambda text, value: len(_BULLET.findall(text)) == value,
    "min_highlights": lambda text, value: len(_HIGHLIGHT.findall(text)) >= value,
    "min_placeholders": lambda text, value: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= value,
    "must_include": lambda text, value: all(_occurrences(text, phrase) for phrase in _phrases(value)),
    "forbid": lambda text, value: not any(_occurrences(text, phrase) for phrase in _phrases(value)),
    "min_occurrences": lambda text, value: _each(text, value, _occurrences, least=True),
    "max_occurrences": lambda text, value: _each(text, value, _occurrences, least=False),
    "min_letter": lambda text, value: _each(text, value, _letters, least=True),
    "max_letter": lambda text, value: _each(text, value, _letters, least=False),
    "lowercase": lambda text, value: _same_case(text, value, text.lower()),
    "uppercase": lambda text, value: _same_case(text, value, text.upper()),
    "min_capital_words": lambda text, value: _capital_words(text) >= value,
    "max_capital_words": lambda text, value: _capital_words(text) <= value,
    "no_commas": lambda text, value: ("," not in text) == bool(value),
    "title": lambda text, value: bool(re.search(r"<<[^\n<>]+>>", text)) == bool(value),
    "postscript": lambda text, value: re.search(rf"^\s*{re.escape(value)}", text, re.MULTILINE) is not None,
    "json": lambda text, value: _is_json(text) == bool(value),
    "quoted": lambda text, value: (len(text) > 1 and text[0] == text[-1] == '"') == bool(value),
    "num_responses": lambda text, value: len([part for part in text.split("******") if part.strip()]) == value,
    "repeats_first": lambda text, value: text.startswith(value) and len(text) > len(value),
    "one_of": lambda text, value: any(phrase in text for phrase in _phrases(value)),
    "starts_with": lambda text, value: text.startswith(value),
    "ends_with": lambda text, value: text.endswith(value),
}
