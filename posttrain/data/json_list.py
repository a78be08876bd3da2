"""Reads the items of a JSON list one by one, with the decoder of the standard library.

`json.load` would hold the whole file and all of its items. Here only the text of a few items is in memory.
"""

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters that are read at a time
_SPACE = " \t\n\r"
_NEAR = 16  # characters: an error so close to the end of the text so far may only mean that more is needed


def json_items(file: TextIO) -> Iterator[tuple[Any, str]]:
    """Yield each item of the list in a file, with its text.

    Numbers beyond float64 become infinities, and NaN is accepted, so that the caller can name the item. Raises
    ValueError, which gives the place in the file, if it is not JSON or not a list.
    """
    source = _Source(file)
    if source.next_character() != "[":
        raise ValueError(source.no_list())
    source.skip(1)
    if source.next_character() == "]":
        source.skip(1)
    else:
        while True:
            yield source.item()
            mark = source.next_character()
            if mark not in (",", "]"):
                raise source.error("Expecting ',' delimiter")
            source.skip(1)
            if mark == "]":
                break
    if source.next_character():
        raise source.error("Extra data")


class _Source:
    """The text of a file from the current position on, as far as it was read."""

    def __init__(self, file: TextIO):
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self._line, self._before = 1, 0  # the line of the text's first character; characters of the file before it
        self._column = 0  # characters of that line before the text
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is no space, which becomes the current position; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, count: int) -> None:
        """Move the position by characters that were read."""
        self._at += count

    def item(self) -> tuple[Any, str]:
        """The value at the current position, and its text; the position moves behind it."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                found = self.error(error.msg, error.pos)
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR
                if not unfinished or not self._more():
                    raise found from None
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            text, self._at = self._text[self._at : end], end
            return value, text

    def no_list(self) -> str:
        """The error text for a file that holds no list."""
        if not self.next_character():
            return "not JSON: the file is empty"
        value, _ = self.item()
        if self.next_character():
            return f"{self.error('Extra data')}; if it is JSON lines, name it .jsonl"
        lists = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
        hint = f"; write the list under {lists[0]!r} alone" if lists else ""
        return f"holds {type(value).__name__}, but must hold a list of objects{hint}"

    def error(self, what: str, at: int | None = None) -> ValueError:
        """The error for the current position, or for `at` in the text."""
        at = self._at if at is None else at
        line = self._line + self._text.count("\n", 0, at)
        start = self._text.rfind("\n", 0, at)
        column = at - start if start >= 0 else at + 1 + self._column
        return ValueError(f"not JSON: {what}: line {line} column {column} (char {self._before + at})")

    def _more(self) -> bool:
        """Read on, as much again as is waiting, and forget what lies behind. False at the end of the file."""
        if self._ended:
            return False
        done = self._text[: self._at]
        self._line += done.count("\n")
        self._column = len(done) - 1 - done.rfind("\n") if "\n" in done else self._column + len(done)
        self._before += len(done)
        self._text, self._at = self._text[self._at :], 0
        read = self._file.read(max(CHUNK, len(self._text)))
        self._ended = not read
        self._text += read
        return bool(read)
