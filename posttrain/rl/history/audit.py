"""`posttrain ledger audit`: check that a run lost no group and trained on none twice.

Two records of the run are compared. The ledger says what became of each group, and the archive holds the rollouts that
each step trained on. The audit checks each for itself, and that both agree.

A run writes a step to the archive first, and undoes steps in the ledger first. So a kill leaves the archive ahead of
the ledger, never behind it. That is no fault, and the audit only counts such steps, in two cases: the file of the step
after the ledger's last one is there, and its groups are scored; or the ledger has undone steps, and none was made since
then. In both, the run that is continued removes these files.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.base import read_yaml
from posttrain.rl.history.archive import check_archive
from posttrain.rl.history.ledger import Entry, Ledger
from posttrain.rl.history.recovery import SNAPSHOT, folder_hash
from posttrain.rl.records import GroupState, LedgerEvent

# Which events may follow which event of one group. RESTARTED: it was sampled again, after a crash or because the policy
# version of its tokens was lost.
_UNFINISHED = (LedgerEvent.DROPPED, LedgerEvent.RESTARTED)
_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: (LedgerEvent.RESERVED,),
    LedgerEvent.RESERVED: (LedgerEvent.GENERATED, *_UNFINISHED),
    LedgerEvent.RESTARTED: (LedgerEvent.GENERATED, *_UNFINISHED),
    LedgerEvent.GENERATED: (LedgerEvent.SCORED, *_UNFINISHED),
    LedgerEvent.SCORED: (LedgerEvent.TRAINED, *_UNFINISHED),
    LedgerEvent.TRAINED: (LedgerEvent.TRAINED, *_UNFINISHED),  # TRAINED twice: the first step was rolled back
    LedgerEvent.DROPPED: (),
}
_SHOWN = 5
_TRAINED = (GroupState.TRAINED, GroupState.COMMITTED)
_SHOWN_STATES = tuple(GroupState)


@dataclass
class Audit:
    """The result of an audit. totals: counts by name. problems: one text for each fault; empty if there is none."""

    stage: Path
    totals: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """True if no problem was found."""
        return not self.problems


def audit_stage(stage: Path) -> Audit:
    """Audit the RL stage in the folder `stage`."""
    audit = Audit(stage)
    ledger = Ledger(stage / SNAPSHOT)
    try:
        entries, log, commits = ledger.entries(), ledger.log(), ledger.commits()
    finally:
        ledger.close()
    config = read_yaml(stage / "config.yaml") if (stage / "config.yaml").exists() else {}
    _count(audit, entries, log, num_commits=len(commits))
    _nothing_lost(audit, entries, log)
    _transitions(audit, log)
    last = commits[-1] if commits else None
    if last is not None:
        if not (stage / last.folder).is_dir():
            audit.problems.append(f"the last commit names {last.folder}, which does not exist")
        elif folder_hash(stage / last.folder) != last.hash:
            audit.problems.append(f"the content of {last.folder} is not what the last commit recorded")
    _steps(audit, entries, groups_per_step=config.get("groups_per_step"), committed=last.version if last else 0)
    _archive(audit, entries, stage, gap=_gap(entries, log), max_staleness=config.get("max_staleness"))
    return audit


def _count(audit: Audit, entries: list[Entry], log: list[Any], *, num_commits: int) -> None:
    states = Counter(entry.state for entry in entries)
    reasons = Counter(entry.reason for entry in entries if entry.state == GroupState.DROPPED)
    rolled = [value for _, _, event, _, value in log if event == LedgerEvent.ROLLED_BACK]
    audit.totals = {
        "groups": len(entries),
        **{name: states[name] for name in _SHOWN_STATES},
        **{f"dropped:{reason}": count for reason, count in sorted(reasons.items())},
        "steps": len({entry.step for entry in entries if entry.state in _TRAINED}),
        "commits": num_commits,
        "resumed": len(rolled),
        "steps_rolled_back": sum(value["steps"] for value in rolled),
        "groups_rolled_back": sum(value["groups"] for value in rolled),
        "groups_restarted": sum(event == LedgerEvent.RESTARTED for _, _, event, _, _ in log),
        "engines_replaced": sum(event == LedgerEvent.ENGINE_REPLACED for _, _, event, _, _ in log),
    }


def _nothing_lost(audit: Audit, entries: list[Entry], log: list[Any]) -> None:
    there = {entry.id for entry in entries}
    missing = sorted(set(range(max(there, default=-1) + 1)) - there)
    if missing:
        audit.problems.append(f"{len(missing)} dispatched groups are missing from the ledger: {missing[:_SHOWN]}")
    pending = [entry.id for entry in entries if entry.state not in (GroupState.COMMITTED, GroupState.DROPPED)]
    if _is_finished(log) and pending:
        audit.problems.append(f"the run is finished, but {len(pending)} groups are undecided: {pending[:_SHOWN]}")


def _last_of(log: list[Any], *events: LedgerEvent) -> str | None:
    """The latest of these events, or None if there was none."""
    return next((event for _, _, event, _, _ in reversed(log) if event in events), None)


def _is_finished(log: list[Any]) -> bool:
    """Whether the last step was made. A finished stage that goes on with more steps begins anew."""
    return _last_of(log, LedgerEvent.FINISHED, LedgerEvent.ROLLED_BACK) == LedgerEvent.FINISHED


def _transitions(audit: Audit, log: list[Any]) -> None:
    last: dict[int, str] = {}
    for seq, _, event, order, value in log:
        if event == LedgerEvent.FORGOTTEN:  # a deterministic run dispatches these groups again
            last = {known: state for known, state in last.items() if known < value}
        if order is None:
            continue
        if event not in _FOLLOWS[last.get(order)]:
            audit.problems.append(f"group {order} was {event} after {last.get(order)} (log {seq})")
        last[order] = event


def _steps(audit: Audit, entries: list[Entry], *, groups_per_step: int | None, committed: int) -> None:
    by_step: dict[int, int] = Counter(
        entry.step for entry in entries if entry.state in _TRAINED and entry.step is not None
    )
    if sorted(by_step) != list(range(len(by_step))):
        audit.problems.append(
            f"steps are missing: groups were trained in steps {sorted(by_step)[:20]}, which are not consecutive from 0"
        )
    for step, count in sorted(by_step.items()):
        if groups_per_step is not None and count != groups_per_step:
            audit.problems.append(f"step {step} trained on {count} groups, not {groups_per_step}")
    late = [entry.id for entry in entries if entry.state == GroupState.COMMITTED and (entry.step or 0) >= committed]
    if late:
        audit.problems.append(f"groups {late[:_SHOWN]} are committed, but no commit covers their steps")


@dataclass(frozen=True, slots=True)
class _Gap:
    """The steps that a kill may have left in the archive alone.

    next_step: one more than the last step of the ledger. is_undone: whether no step was made since the ledger undid
    some. scored: the names of the groups that are scored. The run is not finished.
    """

    next_step: int
    is_undone: bool
    scored: frozenset[str]

    def holds(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the trained rollouts of one file are of such a step."""
        steps = {row["step"] for row in rows}
        if self.is_undone:
            return min(steps, default=-1) >= self.next_step
        return steps == {self.next_step} and {row["group_id"] for row in rows} <= self.scored


def _gap(entries: list[Entry], log: list[Any]) -> _Gap | None:
    """None for a finished run, which has no gap."""
    if _is_finished(log):
        return None
    trained = [entry.step for entry in entries if entry.state in _TRAINED and entry.step is not None]
    return _Gap(
        1 + max(trained, default=-1),
        _last_of(log, LedgerEvent.TRAINED, LedgerEvent.ROLLED_BACK) == LedgerEvent.ROLLED_BACK,
        frozenset(f"g{entry.id}" for entry in entries if entry.state == GroupState.SCORED),
    )


def _archive(audit: Audit, entries: list[Entry], stage: Path, *, gap: _Gap | None, max_staleness: int | None) -> None:
    """Check the rollouts: every trained group is in one step only, the same as in the ledger, and not too stale."""
    import pyarrow.parquet as pq

    seen: dict[str, set[tuple[int, int]]] = defaultdict(set)
    doubled, too_old, uncovered, tokens, num_ahead = [], [], [], 0, 0
    for path in sorted((stage / "rollouts").glob("step_*.parquet")):
        check_archive(path)
        names = ["step", "group_id", "index", "versions", "segments", "sampler_logprobs", "num_tokens", "status"]
        rows = [row for row in pq.read_table(path, columns=names).to_pylist() if row["status"] == "trained"]
        if gap is not None and gap.holds(rows):
            num_ahead += 1
            continue
        for row in rows:
            key = (row["step"], row["index"])
            if key in seen[row["group_id"]]:
                doubled.append(row["group_id"])
            seen[row["group_id"]].add(key)
            spans = json.loads(row["versions"])
            tokens += row["num_tokens"]
            if not _is_covered(row, spans):
                uncovered.append(row["group_id"])
            age = row["step"] - min((version for version, _, _ in spans), default=row["step"])
            if max_staleness is not None and not 0 <= age <= max_staleness:
                too_old.append(row["group_id"])
    audit.totals["steps_unrecorded"] = num_ahead
    audit.totals["tokens_trained"] = tokens
    twice = sorted(set(doubled) | {name for name, keys in seen.items() if len({s for s, _ in keys}) > 1})
    audit.totals["trained_twice"] = len(twice)
    if twice:
        audit.problems.append(f"{len(twice)} groups were trained twice: {twice[:_SHOWN]}")
    if too_old:
        audit.problems.append(f"tokens with a staleness above max_staleness ({max_staleness}) in {too_old[:_SHOWN]}")
    if uncovered:
        audit.problems.append(f"sampled or trained tokens without exactly one policy version in {uncovered[:_SHOWN]}")
    ledger = {f"g{entry.id}": entry.step for entry in entries if entry.state in _TRAINED}
    archive = {name: next(iter(keys))[0] for name, keys in seen.items()}
    only_ledger = sorted(name for name, step in ledger.items() if archive.get(name) != step)
    only_archive = sorted(name for name, step in archive.items() if ledger.get(name) != step)
    audit.totals["lost"] = len(only_ledger)
    if only_ledger:
        audit.problems.append(f"trained according to the ledger, but not in the rollouts: {only_ledger[:_SHOWN]}")
    if only_archive:
        audit.problems.append(f"trained according to the rollouts, but not in the ledger: {only_archive[:_SHOWN]}")


def _is_covered(row: dict[str, Any], spans: list[list[int]]) -> bool:
    """Whether every sampled token of a rollout has exactly one policy version, and only sampled tokens are trained."""
    sampled = [place for place, value in enumerate(row["sampler_logprobs"]) if value is not None]
    segments = json.loads(row["segments"])
    trained = {place for start, end, is_trained, *_ in segments if is_trained for place in range(start, end)}
    covered = [place for _, start, end in spans for place in range(start, end)]
    return covered == sampled and trained <= set(sampled) and len(sampled) == row["num_tokens"]
