"""The constraints of the reward `instructions`. Each is a function of the reply's text and the constraint's value.

Source: IFEval, arXiv 2311.07911, whose verifiable instructions these follow. Left out: its checks of the language, for
which a model would have to guess.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from .valid_json import read_strictly

# Letters of other scripts that look like Latin ones: a forbidden word must not pass in disguise.
_LOOK_ALIKES = str.maketrans(
    "АВЕКМНОРСТХаеорсухіјѕԁԛԝһΑΒΕΖΗΙΚΜΝΟΡΤΥΧαορν", "ABEKMHOPCTXaeopcyxijsdqwhABEZHIKMNOPTYXaopv"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:dr|mr|mrs|ms|prof|st|vs|etc|no|fig|approx|cf|ca|jr|sr)|\b[a-z](?:\.[a-z])*)\.\Z", re.IGNORECASE
)
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_BULLET = re.compile(r"^[^\S\n]*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]*_]*(?=\s|$)")
_HIGHLIGHT = re.compile(r"\*\*(?=[^\n*\w]*\w)[^\n*]*\*\*|(?<!\*)\*(?!\s)(?=[^\n*\w]*\w)[^\n*]*\*(?!\*)")
_PLACEHOLDER = re.compile(r"\[(?=[^\[\]\n\w]*\w)[^\[\]\n]*\](?!\()")
_TITLE = re.compile(r"<<(?=[^\n<>\w]*\w)[^\n<>]*>>")


def loose_variants(text: str) -> list[str]:
    """The texts of IFEval's loose check: the reply, and the reply without its first line, last line, both, or stars."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys([variant for part in cut for variant in (part, part.replace("*", ""))]))


def visible(text: str) -> str:
    """The text without characters that are not seen: zero-width spaces, soft hyphens, signs of direction."""
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf")


def _says_something(text: str) -> bool:
    """Whether there is a letter or a digit, so that punctuation alone is no word, sentence or paragraph."""
    return any(map(str.isalnum, text))


def _count_words(text: str) -> int:
    return sum(map(_says_something, text.split()))


def _sentences(text: str) -> int:
    """Sentences end with a sign and a space. The point of a number, an address or an abbreviation ends none."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        if (
            end[0].startswith(".")
            and end.end() < len(text.rstrip())
            and _ABBREVIATION.search(text[max(start, end.start() - 40) : end.start() + 1])
        ):
            continue
        count += _says_something(text[start : end.end()])
        start = end.end()
    return count + _says_something(text[start:])


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if _says_something(part)]


def _begins(text: str, phrase: str) -> bool:
    """Whether the text begins with the phrase, which does not end within a word."""
    return text.startswith(phrase) and not (phrase[-1:].isalnum() and text[len(phrase) :][:1].isalnum())


def _ends(text: str, phrase: str) -> bool:
    """Whether the text ends with the phrase, which does not begin within a word."""
    before = text[: len(text) - len(phrase)]
    return text.endswith(phrase) and not (phrase[:1].isalnum() and before[-1:].isalnum())


def _number_named(text: str, phrases: list[str]) -> int:
    """How many of the phrases occur as whole words, without those that are only a part of another one that does."""
    found = [phrase for phrase in phrases if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)]
    return sum(not any(phrase != other and phrase in other for other in found) for phrase in found)


def _occurrences(text: str, phrase: str) -> int:
    """How often the phrase occurs as whole words, in any case. Letters in other forms (bold, full-width) count too."""
    text, phrase = (unicodedata.normalize("NFKC", one).translate(_LOOK_ALIKES) for one in (text, phrase))
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _phrases(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(phrase) for phrase in value]


def _same_case(text: str, wanted: bool, cased: str) -> bool:
    """Whether the text has letters and equals `cased`. With `wanted: false`, the opposite."""
    return (any(letter.isalpha() for letter in text) and text == cased) == bool(wanted)


def _is_json(text: str) -> bool:
    block = re.fullmatch(r"```(?:json)?[^\S\n]*\n(.*?)\n?```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        read_strictly(block[1] if block else text)
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
    "min_chars": lambda text, value: len(" ".join(text.split())) >= value,
    "num_lines": lambda text, value: sum(bool(line.strip()) for line in text.split("\n")) == value,
    "num_paragraphs": lambda text, value: len(_paragraphs(text)) == value,
    "paragraph_starts_with": lambda text, value: all(
        0 < int(number) <= len(_paragraphs(text))
        and _begins(_paragraphs(text)[int(number) - 1].casefold(), str(word).casefold())
        for number, word in value.items()
    ),
    "num_sections": lambda text, value: len(re.findall(r"^#{1,6}\s+\S", _FENCED.sub("", text), re.MULTILINE)) == value,
    "bullet_count": lambda text, value: len(_BULLET.findall(text)) == value,
    "min_highlights": lambda text, value: len(_HIGHLIGHT.findall(text)) >= value,
    "min_placeholders": lambda text, value: len(_PLACEHOLDER.findall(text)) >= value,
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
    "no_commas": lambda text, value: (not re.search("[,，、،‚﹐﹑︐︑]", text)) == bool(value),
    "title": lambda text, value: bool(_TITLE.search(text)) == bool(value),
    "postscript": lambda text, value: re.search(rf"^[^\S\n]*{re.escape(value)}.*\w", text, re.MULTILINE) is not None,
    "json": lambda text, value: _is_json(text) == bool(value),
    "quoted": lambda text, value: (
        (len(text) > 1 and text[0] == text[-1] == '"' and _says_something(text)) == bool(value)
    ),
    "num_responses": lambda text, value: (
        len({part.strip() for part in text.split("******") if _says_something(part)}) == value
    ),
    "repeats_first": lambda text, value: text.startswith(value) and _says_something(text[len(value) :]),
    "one_of": lambda text, value: _number_named(text, _phrases(value)) == 1,
    "starts_with": lambda text, value: _begins(text, value),
    "ends_with": lambda text, value: _ends(text, value),
}
