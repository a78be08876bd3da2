"""Cuts a text into parts at the signs between them, outside brackets."""

import re

from .tokens import Unreadable

MAX_PARTS = 60
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
BRACKETS = re.compile(r"\\[{}]|\\[lr]angle(?![A-Za-z])|[()\[\]{}]")


def split(text: str) -> list[str]:
    """The items of a list, separated by commas outside brackets; by semicolons if the text has both."""
    parts, joints = cut(text, re.compile("[,;]"))
    if ";" in joints and "," in joints:
        return cut(text, re.compile(";"))[0]
    return parts


def cut(text: str, joint: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between joints outside brackets, and the joints. Raises Unreadable for unequal brackets."""
    parts, joints, level, start, place = [], [], 0, 0, 0
    while place < len(text):
        if level == 0 and (found := joint.match(text, place)) and found.end() > place:
            parts.append(text[start:place])
            joints.append(found[0].strip())
            start = place = found.end()
        elif bracket := BRACKETS.match(text, place):
            level += step(bracket[0])
            if level < 0:
                raise Unreadable("a bracket is missing")
            place = bracket.end()
        elif text.startswith("\\begin", place):
            end = text.find("\\end", place)
            place = len(text) if end < 0 else end + 4
        else:
            place += 1
    if level:
        raise Unreadable("a bracket is missing")
    if len(parts) > MAX_PARTS:
        raise Unreadable("a list is too long")
    return [*parts, text[start:]], joints


def step(bracket: str) -> int:
    """1 for an opening bracket, -1 for a closing one."""
    return 1 if bracket in ("(", "[", "{", "\\{", "\\langle") else -1


def rejoined(parts: list[str], signs: list[str]) -> str:
    """The text of which `cut` made these parts and signs."""
    return parts[0] + "".join(f"{sign} {part}" for sign, part in zip(signs, parts[1:], strict=True))


def without_thousands(text: str) -> str:
    """The text without the commas in numbers such as 1,234. In brackets they stay, because they may separate items."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        outside = all(before.count(left) == before.count(right) for left, right in ("()", "[]", "{}"))
        return match[0].replace(",", "") if outside else match[0]

    return _THOUSANDS.sub(joined, text)
