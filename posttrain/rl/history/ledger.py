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

Changes are collected, and `flush` writes them to the disk (ledger_file.py). A SIGKILL loses the transitions since the
last flush. This is no error: at worst a group is sampled again.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from posttrain.decoding import named_field
from posttrain.errors import StageError
from posttrain.rl.history.ledger_file import LedgerFile, json_text
from posttrain.rl.history.replies import pack
from posttrain.rl.records import GroupState, LedgerEvent
from posttrain.sampling.rollouts import Reply

UNDECIDED = (GroupState.RESERVED, GroupState.GENERATED, GroupState.SCORED)

# The changes of single groups. The first column is the id of the group.
_RESERVE = "INSERT INTO groups (id, prompt_id, capability, system, prompts_seen, stamp, state) VALUES {rows}"
_SAMPLED_SO_FAR = (
    "INSERT OR REPLACE INTO replies (id, data) SELECT id, new.column2 FROM (VALUES {rows}) AS new "
    "JOIN groups ON id = new.column1 WHERE state = 'reserved'"
)
_KEEP_REPLIES = "INSERT OR REPLACE INTO replies (id, data) VALUES {rows}"
_FORGET_REPLIES = "DELETE FROM replies WHERE id IN (VALUES {rows})"
_KEEP_SCORES = "UPDATE replies SET scores = new.column2 FROM (VALUES {rows}) AS new WHERE id = new.column1"


def _set(changes: str) -> str:
    """A change of columns of `groups`. changes: has new.column2 for the second value of a row, and so on."""
    return f"UPDATE groups SET {changes} FROM (VALUES {{rows}}) AS new WHERE id = new.column1"


_GENERATED = _set("state = 'generated', oldest = new.column2, newest = new.column3, tokens = new.column4")
_SCORED = _set("state = 'scored', scored_seq = new.column2")
_DROPPED = _set("state = 'dropped', reason = new.column2")
_TRAINED = _set("state = 'trained', step = new.column2")
_RESTARTED = _set(
    "state = 'reserved', stamp = new.column2, oldest = NULL, newest = NULL, scored_seq = NULL, attempts = attempts + 1"
)


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


class Ledger:
    """The ledger of one RL stage. Methods that change something return at once; `flush` writes the changes to disk."""

    def __init__(self, path: Path):
        self.path = path
        self._file = LedgerFile(path)
        self._archived_seq = 0  # of the last commit since the file was opened

    # ------------------------------------------------------------------ transitions

    def reserve(
        self, order: int, prompt_id: str, capability: str, *, system: str | None, prompts_seen: int, stamp: int
    ) -> None:
        """Note that a group is admitted and is about to be sampled, by policy version `stamp` or later ones."""
        row = (order, prompt_id, capability, system, prompts_seen, stamp, GroupState.RESERVED.value)
        self._file.write_row(_RESERVE, row)
        self._file.log(LedgerEvent.RESERVED, order, stamp)

    def sampled_so_far(self, order: int, replies: Sequence[Reply]) -> None:
        """Note the replies of a group as far as they are sampled. Later replies of the same group replace them."""
        # The change is written at a flush if the group is still in flight then.
        self._file.write_latest(_SAMPLED_SO_FAR, (order, partial(pack, replies)))

    def generated(self, order: int, replies: Sequence[Reply]) -> None:
        """Note that all replies of a group are sampled."""
        self._file.discard_latest(order)
        versions = [span.policy_version for reply in replies for part in reply.segments for span in part.versions]
        oldest, newest = min(versions), max(versions)
        tokens = sum(reply.num_sampled for reply in replies)
        self._file.write_row(_KEEP_REPLIES, (order, partial(pack, replies)))
        self._file.write_row(_GENERATED, (order, oldest, newest, tokens))
        self._file.log(LedgerEvent.GENERATED, order, [oldest, newest])

    def scored(self, order: int, scores: Mapping[str, object]) -> None:
        """Note that a group has its rewards. scores: as `scores_json` gives them."""
        self._file.write_row(_KEEP_SCORES, (order, json_text(scores)))
        seq = self._file.log(LedgerEvent.SCORED, order)
        self._file.write_row(_SCORED, (order, seq))

    def dropped(self, order: int, reason: str) -> None:
        """Note that a group will never be trained on, and why."""
        self._file.discard_latest(order)
        self._file.write_row(_DROPPED, (order, reason))
        self._file.log(LedgerEvent.DROPPED, order, reason)

    def trained(self, orders: Iterable[int], step: int) -> None:
        """Note that optimizer step `step` trained on these groups."""
        for order in orders:
            self._file.write_row(_TRAINED, (order, step))
            self._file.log(LedgerEvent.TRAINED, order, step)

    def event(self, event: LedgerEvent, value: object = None) -> None:
        """Log an event that concerns no single group, such as an engine that was replaced."""
        self._file.log(event, None, value)

    async def commit(self, commit: Commit, archived_seq: int) -> None:
        """Commit a checkpoint. Once this returns, the run continues from it after a crash.

        archived_seq: a number in the log. Groups that were dropped up to there are in the archive, so the ledger
        deletes their replies.
        """
        # Found by their replies, which are few: a long run has a hundred times as many groups.
        self._file.write(
            "UPDATE groups SET state = 'committed' "
            "WHERE id IN (SELECT id FROM replies) AND state = 'trained' AND step < ?",
            (commit.version,),
        )
        self._file.write(
            "DELETE FROM replies WHERE (SELECT state FROM groups WHERE groups.id = replies.id) = 'committed' OR id IN "
            "(SELECT id FROM log WHERE seq > ? AND seq <= ? AND event = 'dropped')",
            (self._archived_seq, archived_seq),
        )
        self._archived_seq = archived_seq
        row = (commit.version, commit.folder, commit.hash, time.time())
        self._file.write("INSERT OR REPLACE INTO commits (version, folder, hash, time) VALUES (?,?,?,?)", row)
        self._file.log(LedgerEvent.COMMITTED, None, commit.version)
        await self.flush()

    def set_fact(self, name: str, value: object) -> None:
        """Keep a fact about the run, such as its seed, as JSON."""
        self._file.write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, json_text(value)))

    # ------------------------------------------------------------------ after a crash

    def roll_back(self, version: int) -> RolledBack:
        """Undo the steps after the commit of `version`. Their groups have the state "scored" again."""
        steps = self._file.number("SELECT count(DISTINCT step) FROM groups WHERE state = 'trained'")
        groups = self._file.number("SELECT count(*) FROM groups WHERE state = 'trained'")
        self._file.write("UPDATE groups SET state = 'scored', step = NULL WHERE state = 'trained'")
        self._file.log(LedgerEvent.ROLLED_BACK, None, {"to": version, "steps": steps, "groups": groups})
        self._file.flush_now()
        return RolledBack(steps, groups)

    def restart_group(self, order: int, stamp: int, replies: Sequence[Reply]) -> None:
        """Note that a group is sampled again. replies: what is left of its replies, to go on from; may be empty."""
        self._file.write_row(_FORGET_REPLIES, (order,))
        if replies:
            self._file.write_row(_KEEP_REPLIES, (order, partial(pack, replies)))
        self._file.write_row(_RESTARTED, (order, stamp))
        self._file.log(LedgerEvent.RESTARTED, order, stamp)

    def forget_from(self, order: int) -> None:
        """Remove group `order` and all later ones. A run with `deterministic: true` dispatches them again."""
        self._file.write("DELETE FROM replies WHERE id >= ?", (order,))
        self._file.write("DELETE FROM groups WHERE id >= ?", (order,))
        self._file.log(LedgerEvent.FORGOTTEN, None, order)
        self._file.flush_now()

    # ------------------------------------------------------------------ reading

    def last_commit(self) -> Commit | None:
        """The newest commit, or None."""
        found = self.commits()
        return found[-1] if found else None

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
        rows = self._file.rows(
            f"SELECT {names}{columns} FROM groups{joined} WHERE state IN ({marks}) ORDER BY id", tuple(states)
        )
        try:
            return msgspec.convert(rows, list[Entry])
        except msgspec.ValidationError as error:
            reason = named_field(error, list[Entry])
            raise StageError(f"{self.path} holds a group that cannot be read: {reason}") from None

    def state_of(self, order: int) -> GroupState | None:
        """The state of a group, after a flush; None if it was never reserved."""
        self._file.flush_now()
        found = self._file.rows("SELECT state FROM groups WHERE id = ?", (order,))
        return GroupState(found[0][0]) if found else None

    def log(self) -> list[tuple[int, float, str, int | None, Any]]:
        """Every transition: (sequence number, Unix time, event, group, value)."""
        rows = self._file.rows("SELECT seq, time, event, id, value FROM log ORDER BY seq")
        return [
            (seq, at, event, order, None if value is None else msgspec.json.decode(value))
            for seq, at, event, order, value in rows
        ]

    def commits(self) -> list[Commit]:
        """Every commit, oldest first."""
        return [Commit(*row) for row in self._file.rows("SELECT version, folder, hash FROM commits ORDER BY version")]

    def fact(self, name: str) -> Any:
        """The fact that `set_fact` kept under a name, or None."""
        found = self._file.rows("SELECT value FROM facts WHERE name = ?", (name,))
        return msgspec.json.decode(found[0][0]) if found else None

    @property
    def seq(self) -> int:
        """The number of the latest transition in the log."""
        return self._file.seq

    @property
    def next_order(self) -> int:
        """The order of the next group to be dispatched: one more than the highest so far."""
        return self._file.number("SELECT coalesce(max(id) + 1, 0) FROM groups")

    # ------------------------------------------------------------------ the disk

    async def flush(self) -> None:
        """Write all collected changes in a thread. They are on the disk when this returns."""
        await self._file.flush()

    def flush_now(self) -> None:
        """As `flush`, in this thread."""
        self._file.flush_now()

    async def snapshot(self, path: Path) -> None:
        """Copy the ledger to `path`, with all changes up to now."""
        await self._file.snapshot(path)

    def close(self) -> None:
        """Write the changes that are left, and close the file."""
        self._file.close()
