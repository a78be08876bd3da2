"""Splits a formula in one spelling (`notation.py`) into tokens. Decimals become exact fractions, never floats."""

import re
from fractions import Fraction
from typing import NamedTuple


class Unreadable(ValueError):
    """The text is no answer that can be read to its end, or computing it is out of bounds."""


class Token(NamedTuple):
    """kind: number, letter, name (a known word), command, text (upright letters) or sign. start: where in the text."""

    kind: str
    text: str
    start: int
    spaced: bool  # whether a space stands before it
    value: Fraction | None = None


def words(text: str) -> list[str]:
    """The words of a table that is written as a text."""
    return text.split()


MAX_DIGITS = 2000
NAMES = words(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln lg exp sqrt abs max min gcd lcm floor "
    "ceil infinity infty inf pi theta alpha beta"
)
_PATTERN = re.compile(
    r"""(?P<number>(?:\d+(?:\.\d+)?|\.\d+))
      | \\text\s*\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}
      | \\(?P<command>[A-Za-z]+)
      | \\(?P<escaped>[{}%|\#&_])
      | (?P<letters>[A-Za-z]+)
      | (?P<sign>\S)""",
    re.VERBOSE,
)
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.])")
_REPEATED = re.compile(
    r"\s*\\(?:overline|bar|dot)\s*\{\s*(?P<over>\d+)\s*\}(?!\d)|\((?P<in>\d+)\)"
    r"|\s*\\dot\s*\{?\s*(?P<first>\d)\s*\}?(?P<middle>\d*)\\dot\s*\{?\s*(?P<last>\d)(?!\d)\s*\}?"
)
_DOTS = re.compile(r"\s*(?:\.\.\.|\\ldots)")


def tokens_of(text: str) -> list[Token]:
    """The tokens of the text. Raises Unreadable for a number of too many digits."""
    found: list[Token] = []
    place = 0
    while place < len(text):
        spaced = text[place].isspace()
        while place < len(text) and text[place].isspace():
            place += 1
        match = _PATTERN.match(text, place)
        if match is None:
            break
        kind, end = match.lastgroup or "", match.end()
        if kind == "number":
            value, end = _number(text, match)
            found.append(Token("number", text[place:end], place, spaced, value))
        elif kind == "letters":
            found += _letters(match["letters"], place, spaced)
        elif kind == "text":
            found.append(Token("text", match["text"].strip(" ~"), place, spaced))
        elif kind == "escaped":
            found.append(Token("sign", "\\" + match["escaped"], place, spaced))
        else:
            found.append(Token(kind, match[kind], place, spaced))
        place = end
    return found


def _letters(run: str, place: int, spaced: bool) -> list[Token]:
    """Known words as one token, every other letter as a variable of its own."""
    found, rest = [], run
    while rest:
        name = next((name for name in NAMES if rest.startswith(name)), "") if len(rest) > 1 else ""
        taken = name or rest[0]
        found.append(Token("name" if name else "letter", taken, place, spaced))
        place, spaced, rest = place + len(taken), False, rest[len(taken) :]
    return found


def _number(text: str, match: re.Match[str]) -> tuple[Fraction, int]:
    """The value of a numeral and where it ends: with its exponent (1.2e5) and its repeating part (0.1\\overline{6})."""
    digits, end = match["number"], match.end()
    if len(digits) > MAX_DIGITS:
        raise Unreadable("a number has too many digits")
    value = Fraction(digits)
    fraction = digits.partition(".")[2]
    point = "." in digits or text.startswith(".", end)
    start = end + 1 if point and "." not in digits else end
    repeated = _REPEATED.match(text, start) if point else None
    if repeated and len(period := "".join(part for part in repeated.groups() if part)) < 100:
        return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fraction)), repeated.end()
    if fraction and (dots := _DOTS.match(text, end)):
        tail = re.search(r"(\d)\1{2,}$|(\d{2,12}?)\2+$", fraction)
        if tail is None:
            raise Unreadable("a decimal that goes on, without a period that shows")
        period = tail[1] or tail[2]
        head = fraction[: -len(tail[0])]
        value = Fraction(digits.partition(".")[0] + "." + (head or "0"))
        return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(head)), dots.end()
    if exponent := _EXPONENT.match(text, end):
        return value * Fraction(10) ** int(exponent[1]), exponent.end()
    return value, end


class Cursor:
    """The tokens of a text, and the place up to which they are read."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place = text, tokens_of(text), 0

    def peek(self, ahead: int = 0) -> Token | None:
        """The token at the place, or `ahead` tokens later; None beyond the end."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def at(self, *texts: str, ahead: int = 0) -> bool:
        """Whether the token there is one of these signs or commands."""
        token = self.peek(ahead)
        return token is not None and token.text in texts and token.kind in ("sign", "command")

    def take(self, *texts: str) -> bool:
        """Read the token if it is one of these signs or commands; whether it is."""
        if found := self.at(*texts):
            self.place += 1
        return found

    def need(self, text: str) -> None:
        """Read this sign. Raises Unreadable if another token is there."""
        if not self.take(text):
            raise Unreadable(f"{text!r} is missing")
