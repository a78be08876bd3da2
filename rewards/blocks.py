"""Finds the fenced blocks of a reply by the rules of CommonMark: three or more backticks or tildes, a tag, a title."""

import re
from typing import NamedTuple

_OPEN = re.compile(r"(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[^\s`{]*)[^`]*")


class Block(NamedTuple):
    """A fenced block. tag: the first word after the fence, in lower case. text: its lines, with `\\n` at line ends."""

    tag: str
    text: str


def fenced_blocks(text: str) -> list[Block]:
    """The closed blocks of the text, in order. A fence that is indented deeper than the opening one is content."""
    lines = re.sub(r"\r\n?", "\n", text).split("\n")
    found, place = [], 0
    while place < len(lines):
        opening = _OPEN.fullmatch(lines[place])
        place += 1
        if opening is None:
            continue
        end = _end(lines, place, opening["fence"], indent=len(opening["indent"]))
        if end is None:
            continue
        body = [_dedented(line, len(opening["indent"])) for line in lines[place:end]]
        found.append(Block(opening["tag"].lower().strip("{}."), "\n".join(body)))
        place = end + 1
    return found


def _end(lines: list[str], start: int, fence: str, *, indent: int) -> int | None:
    """Index of the line that closes the block; None if there is none.

    It has the sign of the opening fence at least as often, is not indented deeper, and has no other text.
    """
    closing = re.compile(rf" {{0,{indent}}}{re.escape(fence[0])}{{{len(fence)},}}[ \t]*")
    return next((place for place in range(start, len(lines)) if closing.fullmatch(lines[place])), None)


def _dedented(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]
