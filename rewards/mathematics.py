"""Compares answers mathematically. A reply that states several different answers gets 0, and so does a reply whose
answer cannot be read to its end. The folder `expressions/` reads and compares answers.
"""

import functools
import re
from typing import Any

from posttrain.records import RewardResult, Rollout, Row

from .doubts import TAKEN_BACK, is_hedged, is_taken_back
from .expressions.answers import parse_answer
from .expressions.compare import same_answer
from .expressions.notation import key
from .expressions.records import Answer, Either, Named
from .expressions.tokens import Unreadable
from .expressions.units import unit_at
from .stated import boxes, end_of_marks, marked, prose, states_too_often, tagged

REQUIRES = {"math": ["answer"]}
_MAX_CHARS = 500
_LONGEST = 2000  # characters of a line in which an answer is looked for
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!\d)[.;?!](?=\s|$)|(?<=\d)[.;?](?=\s|$)|(?<=\d)!\s(?=[A-Z])")
_FILLERS = re.compile(
    r"(?:(?:therefore|thus|then|hence|so|clearly|simply|just|obviously|indeed|of course|exactly|equal to|given by|"
    r"still|again|now|also|in fact|precisely|evidently|consequently|finally|definitely|actually)\b|,)[\s,:]*",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"[,;]?\s*(?:\(\s*|[—–-]\s+)?(?:,\s*not\b(?!\s+equal)|"
    r"\bsince\b|\bbecause\b|\bas\b(?!\w)|\bwhere\b|\bwhich\b|\bwhen\b|"
    r"\bgiven\b|\bobtained\b|\busing\b|\bi\.e\.|\bby the\b|\bfrom the\b|\brounded\b|"
    r",\s*so\b|,\s*with\b|,\s*for\b|,\s*and\s+(?:this|that|it|we)\b|,\s*no\s+matter\b)(?![^$]*\$\s*$)",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:not|n't)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:or|but|maybe|perhaps|alternatively|either|possibly)\b", re.IGNORECASE)
_NOTE = re.compile(r"\s+\((?![^)]*\d)[A-Za-z][^()]{2,}\)\s*$")
# The signs of a rounded number; words for it count only where the gold is rounded too.
_IS_ROUNDED = re.compile(r"≈|\\approx(?![a-z])|\\sim(?:eq)?(?![a-z])|^\s*~")
_ROUNDED_FIRST = re.compile(
    r"^[\s$]*(?:≈|~|\\approx(?![a-z])|\\sim(?:eq)?(?![a-z])|"
    r"(?:about|approximately|around|roughly|nearly|almost|close to)\b)"
)
_ROUNDED = re.compile(
    r"(?:[≈~]|\b(?:about|approximately|around|roughly|nearly|almost|close to|circa)\b)[\s$*]*\Z", re.IGNORECASE
)
_NUMBER = re.compile(
    r"[-−]?(?:\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)|\d[\d,]*)?[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]|"
    r"[-−]?\d+ \d+/\d+|"
    r"[-−]?\$?(?:\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)|\d+(?:,\d{3})*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?%?"
)
_UNIT = re.compile(
    r"\s?(?:°[CF]?|(?:km/h|m/s(?:\^2|²)?|kph|mph|[munkcd]?m[²³]?|km|k?g|mg|lbs?|oz|ft|min|hours?|minutes?|seconds?|days?|"
    r"met(?:er|re)s?|kilomet(?:er|re)s?|centimet(?:er|re)s?|kilograms?|grams?|lit(?:er|re)s?|dollars?|cents?|inches|feet|miles?)\b)"
)


def warm_up() -> None:
    """Import the slow modules that comparisons need, so that the first score does not wait for them."""
    same_answer(parse_answer("\\sqrt{2}x"), parse_answer("x\\sqrt{2}"))


def math(rollout: Rollout, row: Row) -> RewardResult:
    """1 if the reply's stated answer is mathematically equal to the row's answer, or to one of a list of answers.

    Stated: in `\\boxed{}` or `<answer>`, after "answer is", "answer:" or "####"; else the only formula or number of the
    last line. Text inside `<think>` is not stated. All answers stated must be equal to each other, and each must be
    read to its end. Two units that are both named must agree. Raises ValueError where the row has no answer.
    """
    golds = [_gold(str(one)) for one in _accepted(row.answer)]
    if not any(gold.strip() for gold in golds):
        raise ValueError(f"row {row.id}: its answer {str(row.answer)[:50]!r} cannot be read as mathematics")
    stated = list(dict.fromkeys(stated_answers(rollout.text)))
    if not stated:
        return RewardResult(0.0, reason="no stated answer")
    limit = max(_MAX_CHARS, *(2 * len(gold) for gold in golds))
    if any(len(text) > limit for text in stated):
        return RewardResult(0.0, reason="answer too long")
    if any(not _same(stated[0], text) for text in stated[1:]):
        return RewardResult(0.0, reason="several answers")
    if any(_same(gold, stated[0]) for gold in golds):
        return RewardResult(1.0)
    return RewardResult(0.0, reason="not mathematics" if _parsed(stated[0]) is None else "wrong")


def stated_answers(text: str) -> list[str]:
    """Every final answer that the text states, in order of kind, as written."""
    text = prose(text)
    if states_too_often(text):
        return []
    stated = boxes(text)
    for rest in tagged(text) + marked(text):
        if not boxes(rest) and not rest.startswith(("</", "\\boxed")):
            stated += _from_line(re.split(r"</answer>|<answer>", rest)[0])
    end = end_of_marks(text)
    if not end:
        stated = _unmarked(next((line for line in reversed(text.splitlines()) if line.strip()), ""))
    elif is_taken_back(text, end):
        return []
    return [text for text in map(_trimmed, stated) if text]


def _unmarked(line: str) -> list[str]:
    """The only formula or number of a line, if the line is sure of it."""
    if len(line) > _LONGEST:
        return []
    formulas, numbers = list(_FORMULA.finditer(line)), list(_NUMBER.finditer(line))
    if TAKEN_BACK.search(line):
        return []
    if len(formulas) == 1:
        (found,) = formulas
        text = next(part for part in found.groups() if part)
    elif len(numbers) == 1 and not formulas:
        (found,) = numbers
        unit = _UNIT.match(line, found.end())
        text = found[0] + (unit[0] if unit else "")
    else:
        return []
    rounded = _ROUNDED.search(line[max(0, found.start() - 40) : found.start()])
    return [] if is_hedged(line, found.start(), found.end()) else [(rounded[0] if rounded else "") + text]


def _from_line(rest: str) -> list[str]:
    """The answer at the beginning of the text after a mark, without the reasons that follow it."""
    display = re.match(r"(?:\\\[|\$\$)(.+?)(?:\\\]|\$\$)", rest, re.DOTALL)
    line = display[0] if display else rest.partition("\n")[0]
    if len(line) > _LONGEST:  # its first sentence must end there; else it is too long for an answer in any case
        line = line[:_LONGEST]
        if not _SENTENCE_END.search(_masked(line)):
            return [line]
    while filler := _FILLERS.match(line):
        line = line[filler.end() :]
    if _DENIED.match(line):
        return []
    sentence = line if display else _SENTENCE_END.split(_masked(line))[0]
    if line[len(sentence) : len(sentence) + 1] == "?":
        return []
    sentence = line[: len(sentence)]
    reason = _REASON.search(_masked(sentence))
    if reason and not _HEDGE.search(sentence[reason.start() :]):
        sentence = sentence[: reason.start()]
    sentence = sentence if _HEDGE.search(sentence) else _NOTE.sub("", sentence)
    formulas = _formulas(sentence)
    outside = _FORMULA.sub("", sentence)
    if len(formulas) == 1 and not _HEDGE.search(outside):
        unit = "1 " + outside.strip(" .*:")
        return [sentence if re.match(r"\s*(?:\$|\\\()", sentence) and unit_at(unit, 2) is not None else formulas[0]]
    return formulas if len(formulas) > 1 and not re.search(r"\b(?:and|or)\b|,", outside) else [sentence]


def _masked(line: str) -> str:
    """The line with its formulas masked, so that no word in a formula counts as a word of the sentence."""
    return _FORMULA.sub(lambda match: "#" * len(match[0]), line)


def _formulas(text: str) -> list[str]:
    return [next(part for part in parts if part) for parts in _FORMULA.findall(text)]


def _trimmed(text: str) -> str:
    text = text.strip().strip("*").strip()
    text = re.sub(r"(?<!\.)[.。]$", "", text).strip()
    return text[:-1].strip() if re.search(r"(?<!\\),$", text) else text


def _accepted(answer: object) -> list[Any]:
    found = answer if isinstance(answer, list | tuple) else [answer]
    return [int(one) if isinstance(one, float) and one.is_integer() else one for one in found if one is not None] or [
        ""
    ]


def _gold(text: str) -> str:
    """The row's answer, or what is stated at the end of a whole solution."""
    if "####" in text or "\\boxed" in text:
        return next(iter(stated_answers(text)[-1:]), text)
    return text


def _same(gold: str, reply: str) -> bool:
    if not _may_round(gold, reply):
        return False
    if _IS_ROUNDED.search(gold):
        gold, reply = _ROUNDED_FIRST.sub("", gold), _ROUNDED_FIRST.sub("", reply)
    if key(gold) == key(reply):
        return not _is_hedged(gold)
    one, other = _parsed(gold), _parsed(reply)
    if one is None or other is None:
        return False
    try:
        return same_answer(one, other)
    except (Unreadable, RecursionError, OverflowError):
        return False


def _may_round(gold: str, reply: str) -> bool:
    """Whether the reply may be a rounded number: the gold is rounded too, or has decimals, or the exact one is beside
    it, as in `\\sqrt2 \\approx 1.41`."""
    if not _IS_ROUNDED.search(reply) or _IS_ROUNDED.search(gold):
        return True
    parsed = _parsed(reply)
    inner = parsed.answer if isinstance(parsed, Named) else parsed
    return isinstance(inner, Either) or re.search(r"\d[.,]\d", gold) is not None


def _is_hedged(text: str) -> bool:
    """Whether the text is unsure of its answer, such as "4 or so".

    It gets 0 even if the gold answer is the same text.
    """
    return bool(re.search(r"\b(?:or|but)\s+(?:so|maybe|perhaps)\b", text))


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Answer | None:
    """The answer, or None if it cannot be read to its end."""
    try:
        return parse_answer(text)
    except (Unreadable, RecursionError, OverflowError):
        return None
