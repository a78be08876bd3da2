"""Compares the last line of the reply, or the text after a marker, with the row's answer, as text.

There is no mathematics and no partial credit. Different codes for the same sign (NFC and NFD, kinds of spaces,
quotes and minus signs, full-width digits) are the same text. x² and x2 are different texts.
"""

import json
import re
import unicodedata
from decimal import Decimal
from typing import Any

from posttrain.records import RewardResult, Rollout, Row

from .stated import without_reasoning

REQUIRES = {"exact_match": ["answer"]}
_SIGNS = str.maketrans(
    {**dict.fromkeys("‘’ʼ′", "'"), **dict.fromkeys("“”″", '"'), **dict.fromkeys("−‐‑–﹣－", "-")}
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5E + 1)}
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", "")
)


def exact_match(
    rollout: Rollout, row: Row, marker: str = "", *, ignore_case: bool = False, collapse_whitespace: bool = True
) -> RewardResult:
    """1 if the last line of the reply (or the text after `marker`) is the row's answer, or one of its answers.

    marker: a text, or a regular expression, that occurs once; what follows it is compared: the rest of its line, or
    the next line if nothing does. collapse_whitespace: runs of whitespace count as one space. An answer that is a whole
    float is the integer, a boolean is true or false, null in a list is no answer. Raises ValueError without an answer.
    """
    accepted = _accepted(row.answer)
    if not accepted:
        raise ValueError(f"row {row.id} has no answer to compare with")
    text = without_reasoning(rollout.text)
    said, reason = _after(marker, text) if marker else _last_line(text)
    if said is None:
        return RewardResult(0.0, reason=reason)
    wanted = {
        _normal(spelling, ignore_case or isinstance(answer, bool), collapse_whitespace)
        for answer in accepted
        for spelling in _spellings(answer)
    }
    folded = ignore_case or any(isinstance(answer, bool) for answer in accepted)
    right = bool({_normal(said, ignore_case, collapse_whitespace), _normal(said, folded, collapse_whitespace)} & wanted)
    return RewardResult(1.0) if right else RewardResult(0.0, reason="wrong")


def _accepted(answer: object) -> list[Any]:
    """The accepted answers. Of a list these are all items but null; the list may be stored as JSON text."""
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        try:
            read = json.loads(answer)
        except ValueError:
            read = None
        answer = [answer, *read] if isinstance(read, list) else answer
    return [one for one in (answer if isinstance(answer, list | tuple) else [answer]) if one is not None]


def _spellings(answer: object) -> set[str]:
    """The ways in which the answer may be written. Numbers have no exponent, and whole numbers no `.0`."""
    if isinstance(answer, float) and answer == answer and abs(answer) != float("inf"):
        plain = format(Decimal(repr(answer or 0.0)), "f")  # of -0.0 too
        return {repr(answer), plain, plain.rstrip("0").rstrip(".") if "." in plain else plain}
    return {str(answer)}


def _last_line(text: str) -> tuple[str | None, str]:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return (lines[-1], "") if lines else (None, "empty reply")


def _after(marker: str, text: str) -> tuple[str | None, str]:
    count = text.count(marker)
    if count == 1:
        rest = text.partition(marker)[2]
    else:
        try:
            matches = list(re.finditer(marker, text))
        except re.error:
            matches = []
        if count or len(matches) != 1:
            return None, f"{count or len(matches)} markers"
        rest = text[matches[0].end() :]
    return re.split(r"[\r\n]", rest.lstrip() if not rest.split("\n", 1)[0].strip() else rest, maxsplit=1)[0], ""


def _normal(text: str, ignore_case: bool, collapse_whitespace: bool) -> str:
    text = unicodedata.normalize("NFC", text).translate(_SIGNS)
    text = " ".join(text.split()) if collapse_whitespace else text.strip()
    return unicodedata.normalize("NFC", text.casefold()) if ignore_case else text
