"""Rewrites old or rare notation into the usual one: `{a \\over b}`, `{}_7C_3`, `2**10`, "2.5 million", "3 to 4".

No rule changes a value. It works on text in which each sign has its single spelling already (`notation.py`).
"""

import re

_INFIX = re.compile(r"\\(over|choose)(?![A-Za-z])")
_CHOICES = re.compile(
    r"(?:\{\s*\}\s*|(?<![\w)}\]\s]))[_^]\s*\{?\s*(\d{1,6})\s*\}?\s*(?:\\text\s*)?\{?([CP])\}?"
    r"\s*_\s*\{?\s*(\d{1,6})(?!\d)\s*\}?"
)
_POWER = re.compile(r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])")
_SIZES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SIZE = re.compile(rf"(?<=[\d}}])\s*(\\text\s*\{{)?\s*({'|'.join(_SIZES)})s?(?![A-Za-z])")
_CURRENCY = re.compile(r"\\text\s*\{\s*([€£]|\\dollar)\s*\}")
_RATIO = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)")
_BOLD_SET = re.compile(r"\\(?:mathbf|mathds|Bbb|bold|boldsymbol|textbf)\s*\{?\s*([RZNQC])\s*\}?")
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|bold|textbf|vec|hat|widehat|overrightarrow)\s*(?:\{\s*\\?([ijk])(?:math)?\s*\}|\\?([ijk])(?:math)?(?![A-Za-z]))"
)
_MOST = 20  # fractions and choices of this form in a text


def usual(text: str) -> str:
    """The text in the usual notation."""
    for _ in range(_MOST):
        if (found := _INFIX.search(text)) is None:
            break
        text = _prefixed(text, found)
    text = _POWER.sub("^", _CHOICES.sub(_choices, text))
    text = re.sub(r"\\text\s*\{\s*\}", "", _SIZE.sub(_scaled, text))
    return _RATIO.sub(":", _CURRENCY.sub(r"\1", text))


def styled(text: str) -> str:
    """The text in which bold letters that are sets, and unit vectors, have one spelling. Other styles stay.

    A bold R alone, or after `\\in`, is the set. Bold i and j together, with or without k, are unit vectors.
    """
    text = re.sub(rf"(?:(?<=\\in)|(?<=\\in )|^)\s*{_BOLD_SET.pattern}(?=\s*$)", r"\\mathbb{\1}", text)
    letters = {match[1] or match[2] for match in _UNIT_VECTOR.finditer(text)}
    return _UNIT_VECTOR.sub(r"\\hat{\1\2}", text) if {"i", "j"} <= letters else text


def _prefixed(text: str, found: re.Match[str]) -> str:
    """The text with \\frac or \\binom in place of the sign found, which splits the group in braces around it."""
    start, end = _edge(text, found.start(), -1), _edge(text, found.end(), 1)
    name = "frac" if found[1] == "over" else "binom"
    above, below = text[start : found.start()], text[found.end() : end]
    return f"{text[:start]}\\{name}{{{above}}}{{{below}}}{text[end:]}"


def _edge(text: str, place: int, step: int) -> int:
    """Where the group in braces around the place begins (step -1) or ends (step 1)."""
    level = 0
    here = place - 1 if step < 0 else place
    while 0 <= here < len(text):
        if text[here] in "{}" and text[here - 1 : here] != "\\":
            level += step if text[here] == "{" else -step
            if level < 0:
                return here + 1 if step < 0 else here
        here += step
    return 0 if step < 0 else len(text)


def _choices(match: re.Match[str]) -> str:
    """Choices (C) or arrangements (P) of k out of n, which stand before and after the letter."""
    n, k = match[1], match[3]
    return rf"\binom{{{n}}}{{{k}}}" if match[2] == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def _scaled(match: re.Match[str]) -> str:
    return rf" \times 10^{{{_SIZES[match[2]]}}} " + ("\\text{" if match[1] else "")
