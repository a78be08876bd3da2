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
from posttrain.data.arrays import mapped
from posttrain.data.files import Record
from posttrain.data.stored import StoreWriter
from posttrain.files import write_jsonl

MAX_SHOWN_PROBLEMS = 5
_NAMED_IDS = 100_000  # so many ids are kept with the place of their row, for the error about a second use

_FIRST_TABLE = 1 << 16  # places of the table of hashes, which grows


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
    return [*problems[:MAX_SHOWN_PROBLEMS], *_counted(len(problems) - MAX_SHOWN_PROBLEMS, within)]


def _counted(rest: int, within: int | None = None) -> list[str]:
    where = f"; only the first {within} rows were checked" if within is not None else ""
    return [f"and {rest} more rows with problems{where}"] if rest > 0 else []


class BadRows:
    """The bad rows of a dataset: how many there are, the first ones, and all of them in a file if they are set aside.

    context: of the stage; None: nothing is written, and a warning is given in place of an event. keep: whether the rows
    will be set aside.
    """

    def __init__(self, context: StageContext | None, *, keep: bool):
        self._context = context
        self._rows: StoreWriter[BadRow] | None = None
        if keep and context is not None:
            self._rows = StoreWriter(BadRow, context.dir)
        self._first: list[str] = []
        self._label = ""
        self._count = 0

    def __enter__(self) -> "BadRows":
        return self

    def __exit__(self, *error: object) -> None:
        if self._rows is not None:
            self._rows.discard()

    def __len__(self) -> int:
        return self._count

    def append(self, bad: BadRow) -> None:
        """Add a row."""
        self._label = self._label or bad.record.label
        self._count += 1
        if len(self._first) < MAX_SHOWN_PROBLEMS:
            self._first.append(str(bad))
        if self._rows is not None:
            self._rows.append(bad)

    def summary(self) -> list[str]:
        """The first problems, and a line that counts the others."""
        return [*self._first, *_counted(self._count - len(self._first))]

    def set_aside(self, total: int) -> None:
        """Write the rows to a file in the stage's folder and emit the event `rows_set_aside`.

        total: number of rows that were read, good and bad.
        """
        if self._context is None or self._rows is None:
            warnings.warn(f"{self._count} of {total} rows are left out; the first: {self._first[0]}", stacklevel=5)
            return
        path = self._context.dir / f"set_aside_{Path(self._label).name.partition('.')[0]}.jsonl"
        rows = self._rows.close()
        self._rows = None
        records = ((bad.record, bad.problem) for bad in rows)
        write_jsonl(
            path,
            ({"file": r.file, "row": r.number, "problem": problem, "value": r.value} for r, problem in records),
        )
        self._context.event("rows_set_aside", rows=self._count, of=total, file=str(path), first=self._first[0])


class SeenIds:
    """The ids that rows have used so far.

    The first ids are kept as text with the place of their row. Later ones are kept as hashes of 8 bytes in an
    open-addressing table, which lies in a file (arrays.py) once it has grown.
    """

    def __init__(self, named: int | None = None) -> None:
        self._named = _NAMED_IDS if named is None else named
        self._places: dict[str, str] = {}
        self._table = memoryview(array("Q", bytes(8 * _FIRST_TABLE)))
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
            old, self._table, self._filled = self._table, memoryview(mapped(16 * len(self._table))).cast("Q"), 0
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
