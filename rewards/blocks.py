"""Finds the fenced blocks of a reply by the rules of CommonMark: three or more backticks or tildes, a tag, a title."""

import re
from bisect import bisect_left
from itertools import islice
from typing import NamedTuple

_DEEPEST = 12  # spaces before a fence; CommonMark allows more than three within a list
_OPEN = re.compile(rf"(?P<indent> {{0,{_DEEPEST}}})(?P<fence>`{{3,}}|~{{3,}})[ \t]*(?P<tag>[^\s`{{]*)[^`]*")
_QUOTED = re.compile(r"^ {0,3}> ?(?=(?:`{3}|~{3}))", re.MULTILINE)
_UNQUOTED = re.compile(rf"^ {{0,{_DEEPEST}}}(?:`{{3}}|~{{3}})", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block. tag: the language after the fence, in lower case. text: its lines, with `\\n` at line ends."""

    tag: str
    text: str


class _Close(NamedTuple):
    """A line that can close a block. length: of its fence. longest: length of the longest such fence from here on."""

    place: int
    length: int
    longest: int


def fenced_blocks(text: str) -> list[Block]:
    """The closed blocks of the text, in order. A fence that is indented deeper than the opening one is content."""
    lines = _unquoted(re.sub(r"\r\n?", "\n", text)).split("\n")
    fences = [place for place, line in enumerate(lines) if "```" in line or "~~~" in line]
    closes = {
        (sign, indent): _closes(lines, fences, sign, indent=indent) for sign in "`~" for indent in range(_DEEPEST + 1)
    }
    found, place = [], 0
    for fence in fences:
        opening = _OPEN.fullmatch(lines[fence]) if fence >= place else None
        if opening is None:
            continue
        place = fence + 1
        indent = len(opening["indent"])
        end = _end(closes[opening["fence"][0], indent], place, len(opening["fence"]))
        if end is None:
            continue
        body = [_dedented(line, indent) for line in lines[place:end]]
        found.append(Block(_tag(opening["tag"]), "\n".join(body)))
        place = end + 1
    return found


def _unquoted(text: str) -> str:
    """The text without the signs of a quotation, if it has fences in a quotation (`> ```) and nowhere else."""
    if _UNQUOTED.search(text) or not _QUOTED.search(text):
        return text
    return re.sub(r"^ {0,3}> ?", "", text, flags=re.MULTILINE)


def _tag(text: str) -> str:
    """The language after a fence, in lower case: python of `{.Python}`, `python,linenos`, `python:a.py`."""
    return re.split(r"[,:;=(\[]", text.lower().strip("{}."))[0].rstrip("}")


def _closes(lines: list[str], fences: list[int], sign: str, *, indent: int) -> list[_Close]:
    """The lines among `fences` that can close a block of this sign and indent, in order: they hold a fence alone."""
    pattern = re.compile(rf" {{0,{indent}}}({re.escape(sign)}{{3,}})[ \t]*")
    found: list[_Close] = []
    longest = 0
    for place in reversed(fences):
        if match := pattern.fullmatch(lines[place]):
            longest = max(longest, len(match[1]))
            found.append(_Close(place, len(match[1]), longest))
    return found[::-1]


def _end(closes: list[_Close], start: int, length: int) -> int | None:
    """The first line from `start` on that closes a block whose fence has this length; None if there is none."""
    first = bisect_left(closes, start, key=lambda close: close.place)
    if first == len(closes) or closes[first].longest < length:
        return None
    return next(close.place for close in islice(closes, first, None) if close.length >= length)


def _dedented(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]
