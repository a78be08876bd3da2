"""The ledger: where every prompt group stands, in SQLite, so that a crash neither loses a group nor trains it twice.

    reserved ──► generated ──► scored ──► trained(step) ──► committed
        └─────────────────────────┴─────► dropped(reason)

A group is one row, under the place in which it was dispatched. Beside it lie its replies (as far as they are sampled,
while it is in flight) and its scores, until the step that trained it is committed. The log has every transition in the
order in which it happened.

The commit point is one transaction: it names a checkpoint by its hash, and every group trained in a step before it
becomes committed. A checkpoint that no commit names does not count. After a crash `roll_back` undoes what came after
the last commit: groups of undone steps that were sampled by versions that still exist are scored again as they were,
replies lose the tokens of versions that are gone, and dropped groups stay dropped.

Writes are collected and made in one transaction by `flush`, in a thread: the controller never waits for the disk,
and what a SIGKILL takes is what happened in the last moments. That is never wrong: such a group is only sampled again.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from posttrain.decoding import named_field
from posttrain.errors import CheckpointError, StageError
from posttrain.rl.history.replies import pack
from posttrain.rl.records import GroupState, LedgerEvent
from posttrain.sampling.rollouts import Reply

FORMAT = 2  # of the tables and of the replies in them; kept in the file as `user_version`
UNDECIDED = (GroupState.RESERVED, GroupState.GENERATED, GroupState.SCORED)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id INTEGER PRIMARY KEY, prompt_id TEXT NOT NULL, capability TEXT NOT NULL, system TEXT,
    prompts_seen INTEGER NOT NULL, stamp INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT, step INTEGER,
    oldest INTEGER, newest INTEGER, tokens INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 1,
    scored_seq INTEGER);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state);
CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, data BLOB NOT NULL, scores TEXT);
CREATE TABLE IF NOT EXISTS log (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, id INTEGER, value TEXT);
CREATE TABLE IF NOT EXISTS commits (version INTEGER PRIMARY KEY, folder TEXT NOT NULL, hash TEXT NOT NULL, time REAL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Commit:
    """Policy version `version` is safe in `folder` (within the stage's), whose content hashes to `hash`."""

    version: int
    folder: str
    hash: str


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One group's row. data, scores: see `Ledger`.

    prompts_seen: how many prompts of its capability had been looked at when its own was drawn.
    """

    id: int
    prompt_id: str
    capability: str
    system: str | None
    prompts_seen: int
    stamp: int
    state: GroupState
    reason: str | None
    step: int | None
    oldest: int | None
    newest: int | None
    tokens: int
    attempts: int
    scored_seq: int | None
    data: bytes | None = None
    scores: str | None = None


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What was undone: optimizer steps, and the groups that were trained in them."""

    steps: int
    groups: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one transaction writes."""

    logged: list[tuple[Any, ...]]
    pending: list[tuple[str, Sequence[Any]]]
    begun: dict[int, Sequence[Reply]]


class Ledger:
    """The ledger of one RL stage. Methods that change something return at once; `flush` makes it durable."""

    def __init__(self, path: Path):
        self.path = path
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._check_format()
            self._connection.executescript(_SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")
            self._seq = self._value("SELECT coalesce(max(seq), 0) FROM log")
        except CheckpointError:
            self._connection.close()
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StageError(
                f"{path} is no ledger that can be read ({error}); restore it or start in a new folder"
            ) from None
        self._lock = threading.Lock()  # one writer at a time: flush runs in a thread
        self._pending: list[tuple[str, Sequence[Any]]] = []
        self._logged: list[tuple[Any, ...]] = []  # rows of the log: half of all that is written
        self._batches: deque[_Batch] = deque()
        # Replies in flight, to be written if they are still so at a flush.
        self._begun: dict[int, Sequence[Reply]] = {}

    def _check_format(self) -> None:
        """Raise CheckpointError for a ledger that another version of this package wrote."""
        version = self._value("PRAGMA user_version")
        is_new = not self._value("SELECT count(*) FROM sqlite_master WHERE name = 'groups'")
        if not is_new and version != FORMAT:
            raise CheckpointError(
                f"{self.path} is a ledger of format {version or 1}, which another version of posttrain wrote; this one "
                f"reads format {FORMAT}. Finish the run with the version that began it, or start again in another run "
                "directory"
            )

    # ------------------------------------------------------------------ transitions

    def reserve(
        self, order: int, prompt_id: str, capability: str, *, system: str | None, prompts_seen: int, stamp: int
    ) -> None:
        """A group is admitted; it is about to be sampled with policy version `stamp` or later."""
        self._write(
            "INSERT INTO groups (id, prompt_id, capability, system, prompts_seen, stamp, state) "
            "VALUES (?,?,?,?,?,?,'reserved')",
            (order, prompt_id, capability, system, prompts_seen, stamp),
        )
        self._log(LedgerEvent.RESERVED, order, stamp)

    def begun(self, order: int, replies: Sequence[Reply]) -> None:
        """More of a group's replies is there."""
        self._begun[order] = replies

    def generated(self, order: int, replies: Sequence[Reply]) -> None:
        """All replies of a group are there."""
        self._begun.pop(order, None)
        spans = [span for reply in replies for segment in reply.segments for span in segment.versions]
        oldest, newest = min(span.policy_version for span in spans), max(span.policy_version for span in spans)
        tokens = sum(reply.num_sampled for reply in replies)
        self._write("INSERT OR REPLACE INTO replies (id, data) VALUES (?, ?)", (order, partial(pack, replies)))
        self._write(
            "UPDATE groups SET state = 'generated', oldest = ?, newest = ?, tokens = ? WHERE id = ?",
            (oldest, newest, tokens, order),
        )
        self._log(LedgerEvent.GENERATED, order, [oldest, newest])

    def scored(self, order: int, scores: Any) -> None:
        """A group has its rewards. scores: JSON."""
        self._write("UPDATE replies SET scores = ? WHERE id = ?", (json.dumps(scores), order))
        self._log(LedgerEvent.SCORED, order)
        self._write("UPDATE groups SET state = 'scored', scored_seq = ? WHERE id = ?", (self._seq, order))

    def dropped(self, order: int, reason: str) -> None:
        """A group will never be trained on."""
        self._begun.pop(order, None)
        self._write("UPDATE groups SET state = 'dropped', reason = ? WHERE id = ?", (reason, order))
        self._log(LedgerEvent.DROPPED, order, reason)

    def trained(self, orders: Iterable[int], step: int) -> None:
        """Optimizer step `step` was made of these groups."""
        for order in orders:
            self._write("UPDATE groups SET state = 'trained', step = ? WHERE id = ?", (step, order))
            self._log(LedgerEvent.TRAINED, order, step)

    def event(self, event: LedgerEvent, value: Any = None) -> None:
        """Log what concerns no single group: a version that an engine took, an engine that was replaced."""
        self._log(event, None, value)

    async def commit(self, commit: Commit, archived_seq: int) -> None:
        """The commit point: the commit's folder counts from here on.

        archived_seq: replies of groups dropped up to there are in the archive and need not be kept.
        """
        self._write("UPDATE groups SET state = 'committed' WHERE state = 'trained' AND step < ?", (commit.version,))
        self._write(
            "DELETE FROM replies WHERE id IN (SELECT id FROM groups WHERE state = 'committed') OR id IN "
            "(SELECT id FROM log WHERE event = 'dropped' AND seq <= ?)",
            (archived_seq,),
        )
        row = (commit.version, commit.folder, commit.hash, time.time())
        self._write("INSERT OR REPLACE INTO commits (version, folder, hash, time) VALUES (?,?,?,?)", row)
        self._log(LedgerEvent.COMMITTED, None, commit.version)
        await self.flush()

    def set_fact(self, name: str, value: Any) -> None:
        """Remember something about the run, as JSON."""
        self._write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, json.dumps(value)))

    # ------------------------------------------------------------------ after a crash

    def roll_back(self, version: int) -> RolledBack:
        """Undo what came after the commit of `version`. Groups of undone steps are scored (not trained) again."""
        steps = self._value("SELECT count(DISTINCT step) FROM groups WHERE state = 'trained'")
        groups = self._value("SELECT count(*) FROM groups WHERE state = 'trained'")
        self._write("UPDATE groups SET state = 'scored', step = NULL WHERE state = 'trained'", ())
        self._log(LedgerEvent.ROLLED_BACK, None, {"to": version, "steps": steps, "groups": groups})
        self.flush_now()
        return RolledBack(steps, groups)

    def restart_group(self, order: int, stamp: int, replies: Sequence[Reply]) -> None:
        """A group is sampled again, from what is left of its replies; if that is none, from the start."""
        self._write("DELETE FROM replies WHERE id = ?", (order,))
        if replies:
            self._write("INSERT INTO replies (id, data) VALUES (?, ?)", (order, partial(pack, replies)))
        self._write(
            "UPDATE groups SET state = 'reserved', stamp = ?, oldest = NULL, newest = NULL, scored_seq = NULL, "
            "attempts = attempts + 1 WHERE id = ?",
            (stamp, order),
        )
        self._log(LedgerEvent.RESTARTED, order, stamp)

    def forget_from(self, order: int) -> None:
        """Remove every group from `order` on, as if it had never been: what a deterministic run starts again from."""
        self._write("DELETE FROM replies WHERE id >= ?", (order,))
        self._write("DELETE FROM groups WHERE id >= ?", (order,))
        self._log(LedgerEvent.FORGOTTEN, None, order)
        self.flush_now()

    # ------------------------------------------------------------------ reading

    def last_commit(self) -> Commit | None:
        """The newest commit."""
        row = self._connection.execute("SELECT version, folder, hash FROM commits ORDER BY version DESC").fetchone()
        return None if row is None else Commit(*row)

    def entries(self, states: Sequence[GroupState] = tuple(GroupState), with_data: bool = False) -> list[Entry]:
        """Groups in one of the states, in dispatch order; `data` and `scores` only on request."""
        columns = ", data, scores" if with_data else ""
        joined = " LEFT JOIN replies USING (id)" if with_data else ""
        marks = ",".join("?" * len(states))
        names = (
            "id, prompt_id, capability, system, prompts_seen, stamp, state, reason, step, oldest, newest, tokens, "
            "attempts, scored_seq"
        )
        rows = self._connection.execute(
            f"SELECT {names}{columns} FROM groups{joined} WHERE state IN ({marks}) ORDER BY id", tuple(states)
        )
        try:
            return msgspec.convert(rows.fetchall(), list[Entry])
        except msgspec.ValidationError as error:
            reason = named_field(error, list[Entry])
            raise StageError(f"{self.path} holds a group that cannot be read: {reason}") from None

    def state_of(self, order: int) -> GroupState | None:
        """Where a group stands, with what is not on the disk yet; None for one that was never reserved."""
        self.flush_now()
        row = self._connection.execute("SELECT state FROM groups WHERE id = ?", (order,)).fetchone()
        return None if row is None else GroupState(row[0])

    def log(self) -> list[tuple[int, float, str, int | None, Any]]:
        """Every transition: (sequence number, Unix time, event, group, value)."""
        rows = self._connection.execute("SELECT seq, time, event, id, value FROM log ORDER BY seq")
        return [
            (seq, at, event, order, None if value is None else json.loads(value))
            for seq, at, event, order, value in rows
        ]

    def commits(self) -> list[Commit]:
        """Every commit, oldest first."""
        return [
            Commit(*row)
            for row in self._connection.execute("SELECT version, folder, hash FROM commits ORDER BY version")
        ]

    def fact(self, name: str) -> Any:
        """What was remembered under a name; None if nothing was."""
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    @property
    def seq(self) -> int:
        """Number of the latest transition."""
        return self._seq

    @property
    def next_order(self) -> int:
        """The dispatch order that no group has yet."""
        return self._value("SELECT coalesce(max(id) + 1, 0) FROM groups")

    # ------------------------------------------------------------------ the disk

    async def flush(self) -> None:
        """Write what was collected, in a thread; all of it is on the disk when this returns."""
        # What a flush that was cancelled took may still be waiting, or be in its thread.
        if self._take() or self._batches or self._lock.locked():
            await asyncio.to_thread(self._write_out)

    def flush_now(self) -> None:
        """As `flush`, in this thread."""
        self._take()
        self._write_out()

    def _take(self) -> bool:
        """Queue what was collected for writing; called where it is collected, so that nothing slips between."""
        if self._pending or self._begun or self._logged:
            self._batches.append(_Batch(self._logged, self._pending, self._begun))
            self._logged, self._pending, self._begun = [], [], {}
            return True
        return False

    def _write_out(self) -> None:
        with self._lock:
            execute = self._connection.execute
            while self._batches:
                batch = self._batches.popleft()
                execute("BEGIN IMMEDIATE")
                try:
                    self._connection.executemany("INSERT INTO log VALUES (?,?,?,?,?)", batch.logged)
                    for sql, values in batch.pending:
                        execute(sql, [value() if callable(value) else value for value in values])
                    for order, replies in batch.begun.items():
                        execute(
                            "INSERT OR REPLACE INTO replies (id, data) SELECT id, ? FROM groups WHERE id = ? AND "
                            "state = 'reserved'",
                            (pack(replies), order),
                        )
                    execute("COMMIT")
                except BaseException:
                    execute("ROLLBACK")
                    raise

    async def snapshot(self, path: Path) -> None:
        """Copy the ledger as it stands."""
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
        """Write what is left and close."""
        self.flush_now()
        self._connection.close()

    def _write(self, sql: str, values: Sequence[Any]) -> None:
        self._pending.append((sql, values))

    def _log(self, event: LedgerEvent, order: int | None, value: Any = None) -> None:
        self._seq += 1
        text = None if value is None else str(value) if type(value) is int else json.dumps(value)
        self._logged.append((self._seq, time.time(), event.value, order, text))

    def _value(self, sql: str) -> int:
        return self._connection.execute(sql).fetchone()[0]
