"""The ledger: the state of every group, in SQLite. After a crash no group is lost and none is trained on twice.

    reserved ──► generated ──► scored ──► trained(step) ──► committed
        └─────────────────────────┴─────► dropped(reason)

A group is one row, and its id is its place in the order of dispatch. Another table holds its replies and scores until
the step that trained on it is committed; while a group is in flight, the replies are those sampled so far. The log
lists every transition in the order in which it happened.

A commit is one transaction. It names a checkpoint by its hash, and makes every group committed that an earlier step
trained on. A checkpoint that no commit names does not count. After a crash the run continues from the last commit:
`roll_back` undoes the steps after it, and their groups become "scored" again. `recovery.py` then finds which of their
replies can stay: tokens of policy versions that no longer exist are cut off. Dropped groups stay dropped.

Writes are collected, and `flush` makes them in one transaction, in a thread, so that the controller never waits for the
disk. A SIGKILL loses the transitions since the last flush. This is no error: at worst a group is sampled again.
"""

import asyncio
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

_json = msgspec.json.Encoder()

FORMAT = 2  # the version of the tables and of the replies in them; kept in the file as `user_version`
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
    """Policy version `version` is saved in `folder`, a path within the stage's folder. hash: see `folder_hash`.

    Example: Commit(40, "checkpoints/step_40", "3b1f...").
    """

    version: int
    folder: str
    hash: str


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """The ledger's row of one group.

    id: its place in the order of dispatch, from 0. system: the system instruction that was drawn for it, or None.
    prompts_seen: how many prompts of its capability had been looked at when its own was drawn. stamp: the oldest policy
    version that it may be sampled with. reason: why it was dropped. step: the optimizer step that trained on it.
    oldest, newest: the policy versions of its tokens, once all its replies are sampled. tokens: how many were sampled.
    attempts: how often its sampling was begun. scored_seq: the number of its transition to scored. data: its replies,
    as `pack` writes them, and scores: JSON of `scores_json`; both only if `Ledger.entries` was asked for them.
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
    """What `Ledger.roll_back` undid: how many optimizer steps, and how many groups they had trained on."""

    steps: int
    groups: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """The writes of one transaction."""

    logged: list[tuple[Any, ...]]
    pending: list[tuple[str, Sequence[Any]]]
    sampled_so_far: dict[int, Sequence[Reply]]


class Ledger:
    """The ledger of one RL stage. Methods that change something return at once; `flush` writes the changes to disk."""

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
                f"{path} is no ledger that can be read ({error}); restore it, or start again in a new run directory"
            ) from None
        self._lock = threading.Lock()  # one writer at a time: flush runs in a thread
        self._pending: list[tuple[str, Sequence[Any]]] = []
        self._logged: list[
            tuple[Any, ...]
        ] = []  # rows of the log, apart because they are half of all writes and go in one call
        self._batches: deque[_Batch] = deque()
        # The latest replies of groups in flight. They are written at a flush if the group is still in flight then.
        self._sampled_so_far: dict[int, Sequence[Reply]] = {}

    def _check_format(self) -> None:
        """Raise CheckpointError for a ledger that another version of this package wrote."""
        version = self._value("PRAGMA user_version")
        is_new = not self._value("SELECT count(*) FROM sqlite_master WHERE name = 'groups'")
        if not is_new and version != FORMAT:
            raise CheckpointError(
                f"{self.path} is a ledger of format {version or 1}, which another version of posttrain wrote; this "
                f"version reads format {FORMAT}. Finish the run with the version that began it, or start again in "
                "another run directory"
            )

    # ------------------------------------------------------------------ transitions

    def reserve(
        self, order: int, prompt_id: str, capability: str, *, system: str | None, prompts_seen: int, stamp: int
    ) -> None:
        """Note that a group is admitted and is about to be sampled, by policy version `stamp` or later ones."""
        self._write(
            "INSERT INTO groups (id, prompt_id, capability, system, prompts_seen, stamp, state) "
            "VALUES (?,?,?,?,?,?,'reserved')",
            (order, prompt_id, capability, system, prompts_seen, stamp),
        )
        self._log(LedgerEvent.RESERVED, order, stamp)

    def sampled_so_far(self, order: int, replies: Sequence[Reply]) -> None:
        """Note the replies of a group as far as they are sampled. Later replies of the same group replace them."""
        self._sampled_so_far[order] = replies

    def generated(self, order: int, replies: Sequence[Reply]) -> None:
        """Note that all replies of a group are sampled."""
        self._sampled_so_far.pop(order, None)
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
        """Note that a group has its rewards. scores: as `scores_json` gives them."""
        self._write("UPDATE replies SET scores = ? WHERE id = ?", (_json.encode(scores).decode(), order))
        self._log(LedgerEvent.SCORED, order)
        self._write("UPDATE groups SET state = 'scored', scored_seq = ? WHERE id = ?", (self._seq, order))

    def dropped(self, order: int, reason: str) -> None:
        """Note that a group will never be trained on, and why."""
        self._sampled_so_far.pop(order, None)
        self._write("UPDATE groups SET state = 'dropped', reason = ? WHERE id = ?", (reason, order))
        self._log(LedgerEvent.DROPPED, order, reason)

    def trained(self, orders: Iterable[int], step: int) -> None:
        """Note that optimizer step `step` trained on these groups."""
        for order in orders:
            self._write("UPDATE groups SET state = 'trained', step = ? WHERE id = ?", (step, order))
            self._log(LedgerEvent.TRAINED, order, step)

    def event(self, event: LedgerEvent, value: Any = None) -> None:
        """Log an event that concerns no single group, such as an engine that was replaced."""
        self._log(event, None, value)

    async def commit(self, commit: Commit, archived_seq: int) -> None:
        """Commit a checkpoint. Once this returns, the run continues from it after a crash.

        archived_seq: a number in the log. Groups that were dropped up to there are in the archive, so the ledger
        deletes their replies.
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
        """Keep a fact about the run, such as its seed, as JSON."""
        self._write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, _json.encode(value).decode()))

    # ------------------------------------------------------------------ after a crash

    def roll_back(self, version: int) -> RolledBack:
        """Undo the steps after the commit of `version`. Their groups have the state "scored" again."""
        steps = self._value("SELECT count(DISTINCT step) FROM groups WHERE state = 'trained'")
        groups = self._value("SELECT count(*) FROM groups WHERE state = 'trained'")
        self._write("UPDATE groups SET state = 'scored', step = NULL WHERE state = 'trained'", ())
        self._log(LedgerEvent.ROLLED_BACK, None, {"to": version, "steps": steps, "groups": groups})
        self.flush_now()
        return RolledBack(steps, groups)

    def restart_group(self, order: int, stamp: int, replies: Sequence[Reply]) -> None:
        """Note that a group is sampled again. replies: what is left of its replies, to go on from; may be empty."""
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
        """Remove group `order` and all later ones. A run with `deterministic: true` dispatches them again."""
        self._write("DELETE FROM replies WHERE id >= ?", (order,))
        self._write("DELETE FROM groups WHERE id >= ?", (order,))
        self._log(LedgerEvent.FORGOTTEN, None, order)
        self.flush_now()

    # ------------------------------------------------------------------ reading

    def last_commit(self) -> Commit | None:
        """The newest commit, or None."""
        row = self._connection.execute("SELECT version, folder, hash FROM commits ORDER BY version DESC").fetchone()
        return None if row is None else Commit(*row)

    def entries(self, states: Sequence[GroupState] = tuple(GroupState), with_data: bool = False) -> list[Entry]:
        """The groups in one of the states, in dispatch order; with `data` and `scores` if `with_data`.

        Raises StageError, which names the field, for a row that cannot be read.
        """
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
        """The state of a group, after a flush; None if it was never reserved."""
        self.flush_now()
        row = self._connection.execute("SELECT state FROM groups WHERE id = ?", (order,)).fetchone()
        return None if row is None else GroupState(row[0])

    def log(self) -> list[tuple[int, float, str, int | None, Any]]:
        """Every transition: (sequence number, Unix time, event, group, value)."""
        rows = self._connection.execute("SELECT seq, time, event, id, value FROM log ORDER BY seq")
        return [
            (seq, at, event, order, None if value is None else msgspec.json.decode(value))
            for seq, at, event, order, value in rows
        ]

    def commits(self) -> list[Commit]:
        """Every commit, oldest first."""
        return [
            Commit(*row)
            for row in self._connection.execute("SELECT version, folder, hash FROM commits ORDER BY version")
        ]

    def fact(self, name: str) -> Any:
        """The fact that `set_fact` kept under a name, or None."""
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0])

    @property
    def seq(self) -> int:
        """The number of the latest transition in the log."""
        return self._seq

    @property
    def next_order(self) -> int:
        """The order of the next group to be dispatched: one more than the highest so far."""
        return self._value("SELECT coalesce(max(id) + 1, 0) FROM groups")

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
        """Move the collected changes into one batch; False if there are none.

        It is called in the thread that collects, so that no change can come in between.
        """
        if self._pending or self._sampled_so_far or self._logged:
            self._batches.append(_Batch(self._logged, self._pending, self._sampled_so_far))
            self._logged, self._pending, self._sampled_so_far = [], [], {}
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
                    for order, replies in batch.sampled_so_far.items():
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
        """Copy the ledger to `path`, with all changes up to now."""
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

    def _write(self, sql: str, values: Sequence[Any]) -> None:
        self._pending.append((sql, values))

    def _log(self, event: LedgerEvent, order: int | None, value: Any = None) -> None:
        self._seq += 1
        text = None if value is None else _json.encode(value).decode()
        self._logged.append((self._seq, time.time(), event.value, order, text))

    def _value(self, sql: str) -> int:
        return self._connection.execute(sql).fetchone()[0]
