"""Rows that cannot be used, and the check that every id is used once.

A bad row ends the reading with an error that names it, or, with `on_bad_row: set_aside`, is written to a file of its
own and counted.
"""

import hashlib
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.context import StageContext
from posttrain.data.files import Record
from posttrain.files import write_jsonl

MAX_SHOWN_PROBLEMS = 5
_NAMED_IDS = 100_000  # so many ids are kept with the place of their row, for the error about a second use


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    record: Record
    problem: str

    def __str__(self) -> str:
        return f"{self.record.where}: {self.problem}"


def summary(problems: Sequence[str], within: int | None = None) -> list[str]:
    """The first `MAX_SHOWN_PROBLEMS` problems, and a line that counts the others.

    within: how many rows were looked at, if there are more; None if all were.
    """
    rest = len(problems) - MAX_SHOWN_PROBLEMS
    if rest <= 0:
        return list(problems)
    where = f"; only the first {within} rows were checked" if within is not None else ""
    return [*problems[:MAX_SHOWN_PROBLEMS], f"and {rest} more rows with problems{where}"]


def set_aside(bad: Sequence[BadRow], total: int, context: StageContext | None) -> None:
    """Write bad rows to a file in the stage's folder and emit the event `rows_set_aside`.

    total: number of rows that were read, good and bad. context: of the stage; None only warns, and writes no file.
    """
    first = str(bad[0])
    if context is None:
        warnings.warn(f"{len(bad)} of {total} rows are left out; the first: {first}", stacklevel=4)
        return
    path = context.dir / f"set_aside_{Path(bad[0].record.label).name.partition('.')[0]}.jsonl"
    rows = ({"file": b.record.file, "row": b.record.number, "problem": b.problem, "value": b.record.value} for b in bad)
    write_jsonl(path, rows)
    context.event("rows_set_aside", rows=len(bad), of=total, file=str(path), first=first)


class SeenIds:
    """The ids that rows have used so far.

    The first ids are kept as text with the place of their row. Later ones are kept as hashes of 8 bytes in an
    open-addressing table, so that hundreds of millions of ids fit into memory.
    """

    def __init__(self, named: int | None = None) -> None:
        self._named = _NAMED_IDS if named is None else named
        self._places: dict[str, str] = {}
        self._table = array("Q", bytes(8 << 16))
        self._filled = 0

    def add(self, name: str, where: str) -> str | None:
        """Remember an id. Returns the place of the row that used it before, or None if it is new."""
        if name in self._places:
            return self._places[name]
        if len(self._places) < self._named:
            self._places[name] = where
            return None
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") or 1
        if not self._insert(digest):
            return "an earlier row"
        if self._filled * 3 > len(self._table) * 2:
            old, self._table, self._filled = self._table, array("Q", bytes(16 * len(self._table))), 0
            for value in old:
                if value:
                    self._insert(value)
        return None

    def _insert(self, digest: int) -> bool:
        table = self._table
        at, size = digest % len(table), len(table)
        while table[at]:
            if table[at] == digest:
                return False
            at = (at + 1) % size
        table[at] = digest
        self._filled += 1
        return True
