"""The SQLite file of a ledger: its tables, and changes that are collected and then written in one transaction.

Changes are collected in the controller's thread, which never waits for the disk. `flush` writes them in a thread of its
own: first the lines of the log, then the other changes in the order in which they were made. It takes everything that
was collected or nothing. A SIGKILL loses the changes since the last flush.
"""

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from posttrain.errors import CheckpointError, StageError
from posttrain.rl.records import LedgerEvent

# A value of a row. A function is called when the value is written, so that its work is done in the thread of the flush.
SqlValue = None | int | float | str | bytes | Callable[[], bytes]

FORMAT = 2  # the version of the tables and of the replies in them; kept in the file as `user_version`

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id INTEGER PRIMARY KEY, prompt_id TEXT NOT NULL, capability TEXT NOT NULL, system TEXT,
    prompts_seen INTEGER NOT NULL, stamp INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT, step INTEGER,
    oldest INTEGER, newest INTEGER, tokens INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 1,
    scored_seq INTEGER);
DROP INDEX IF EXISTS groups_by_state;  -- of files of earlier versions: every change of a state changed it too
CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, data BLOB NOT NULL, scores TEXT);
CREATE TABLE IF NOT EXISTS log (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, id INTEGER, value TEXT);
CREATE TABLE IF NOT EXISTS commits (version INTEGER PRIMARY KEY, folder TEXT NOT NULL, hash TEXT NOT NULL, time REAL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_json = msgspec.json.Encoder()


def json_text(value: object) -> str:
    """The value as JSON. Raises TypeError for a value that JSON cannot hold."""
    return _json.encode(value).decode()


Row = Sequence[SqlValue]  # the values for one row of a statement; the first is the id of the group that it changes
MOST_ROWS = 64


def statements(sql: str, rows: Sequence[Row]) -> Iterator[tuple[str, list[Any]]]:
    """The statements that make a change for each row, and the values of each. sql: has {rows} for the rows of VALUES.

    A statement has many rows, because the thread that runs it waits for Python's lock after each statement, up to five
    milliseconds while the event loop works. Their number is a power of two, so that SQLite keeps all statements parsed.
    """
    size, done = MOST_ROWS, 0
    while done < len(rows):
        while size > len(rows) - done:
            size //= 2
        some = rows[done : done + size]
        done += size
        marks = f"({','.join('?' * len(some[0]))})"
        values = [value() if callable(value) else value for row in some for value in row]
        yield sql.format(rows=",".join([marks] * size)), values


class _Batch:
    """The changes of one transaction, and the new rows of its log.

    A change goes to the others by the same statement, before what was changed in between, unless that was its own
    group.
    """

    def __init__(self) -> None:
        self.logged: list[Row] = []
        self.latest: dict[SqlValue, tuple[str, Row]] = {}  # by group; made after all others
        self._runs: list[tuple[str, list[Row]]] = []
        self._run_of: dict[str, int] = {}  # the latest run of each statement that may still grow
        self._last_run: dict[SqlValue, int] = {}  # of each group that was changed

    def __bool__(self) -> bool:
        return bool(self._runs or self.latest or self.logged)

    def add(self, sql: str, row: Row) -> None:
        """Add a change of one group, of which a run has one row at most."""
        group = row[0]
        run = self._run_of.get(sql, -1)
        if run <= self._last_run.get(group, -1):
            run = self._run_of[sql] = len(self._runs)
            self._runs.append((sql, []))
        self._runs[run][1].append(row)
        self._last_run[group] = run

    def add_between(self, sql: str, values: Sequence[SqlValue]) -> None:
        """Add a change of any groups, which stays between what is before and after."""
        self._runs.append((sql, [values]))
        self._run_of, self._last_run = {}, {}

    def statements(self) -> Iterator[tuple[str, Sequence[Any]]]:
        """The statements in order, each with its values."""
        yield from statements("INSERT INTO log VALUES {rows}", self.logged)
        latest: dict[str, list[Row]] = {}
        for sql, row in self.latest.values():
            latest.setdefault(sql, []).append(row)
        for sql, rows in (*self._runs, *latest.items()):
            if "{rows}" in sql:
                yield from statements(sql, rows)
            else:
                yield sql, rows[0]


class LedgerFile:
    """The open file. Raises CheckpointError for a ledger of another format, StageError for any other file."""

    def __init__(self, path: Path):
        self.path = path
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._check_format()
            self._connection.executescript(_SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")
            self._seq = self.number("SELECT coalesce(max(seq), 0) FROM log")
        except CheckpointError:
            self._connection.close()
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StageError(
                f"{path} is no ledger that can be read ({error}); restore it, or start again in a new run directory"
            ) from None
        self._lock = threading.Lock()  # one writer at a time: flush runs in a thread
        self._next = _Batch()
        self._batches: deque[_Batch] = deque()

    def _check_format(self) -> None:
        version = self.number("PRAGMA user_version")
        is_new = not self.number("SELECT count(*) FROM sqlite_master WHERE name = 'groups'")
        if not is_new and version != FORMAT:
            raise CheckpointError(
                f"{self.path} is a ledger of format {version or 1}, which another version of posttrain wrote; this "
                f"version reads format {FORMAT}. Finish the run with the version that began it, or start again in "
                "another run directory"
            )

    # ------------------------------------------------------------------ changes

    @property
    def seq(self) -> int:
        """The number of the latest line of the log."""
        return self._seq

    def log(self, event: LedgerEvent, order: int | None, value: object = None) -> int:
        """Add a line to the log. Returns its number."""
        self._seq += 1
        text = None if value is None else json_text(value)
        self._next.logged.append((self._seq, time.time(), event.value, order, text))
        return self._seq

    def write(self, sql: str, values: Sequence[SqlValue] = ()) -> None:
        """Make a change of any rows at the next flush."""
        self._next.add_between(sql, values)

    def write_row(self, sql: str, row: Row) -> None:
        """Make a change of one group, the id of which is the first value, at the next flush.

        sql: has {rows} where VALUES lists its rows. It may read and change rows of this group alone.
        """
        self._next.add(sql, row)

    def write_latest(self, sql: str, row: Row) -> None:
        """As `write_row`, but after all other changes. A later one of the same group replaces it."""
        self._next.latest[row[0]] = (sql, row)

    def discard_latest(self, group: int) -> None:
        """Do not make the change of `write_latest` for this group, unless it has been written already."""
        self._next.latest.pop(group, None)

    # ------------------------------------------------------------------ reading

    def rows(self, sql: str, values: Sequence[int | str] = ()) -> list[tuple]:
        """The rows that are in the file. Changes since the last flush are not."""
        return self._connection.execute(sql, values).fetchall()

    def number(self, sql: str) -> int:
        """The one value of a query that gives a number."""
        return self._connection.execute(sql).fetchone()[0]

    # ------------------------------------------------------------------ the disk

    async def flush(self) -> None:
        """Write all collected changes in a thread. They are on the disk when this returns."""
        # If an earlier flush was cancelled, its changes may still wait in `_batches` or be in their thread.
        if self._take() or self._batches or self._lock.locked():
            await asyncio.to_thread(self._write_out)

    def flush_now(self) -> None:
        """As `flush`, in this thread."""
        self._take()
        self._write_out()

    def _take(self) -> bool:
        """Close the batch of collected changes; False if it is empty.

        It is called in the thread that collects, so that no change can come in between.
        """
        if self._next:
            self._batches.append(self._next)
            self._next = _Batch()
            return True
        return False

    def _write_out(self) -> None:
        with self._lock:
            execute = self._connection.execute
            while self._batches:
                batch = self._batches.popleft()
                execute("BEGIN IMMEDIATE")
                try:
                    for sql, values in batch.statements():
                        execute(sql, values)
                    execute("COMMIT")
                except BaseException:
                    execute("ROLLBACK")
                    raise

    async def snapshot(self, path: Path) -> None:
        """Copy the file to `path`, with all changes up to now."""
        self._take()
        await asyncio.to_thread(self._snapshot, path)

    def _snapshot(self, path: Path) -> None:
        self._write_out()
        path.unlink(missing_ok=True)
        with self._lock:
            copy = sqlite3.connect(path)
            try:
                self._connection.backup(copy)
            finally:
                copy.close()

    def close(self) -> None:
        """Write the changes that are left, and close the file."""
        self.flush_now()
        self._connection.close()
