"""Continue an interrupted run: find the last commit, and the undecided groups that go on from there.

An undecided group keeps its state if all its tokens were sampled by policy versions that still exist. Otherwise it is
sampled again, from the tokens that can stay. The staleness queue decides later whether a batch is left that is early
enough for its oldest token.
"""

import asyncio
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, StageError
from posttrain.records import Outcome
from posttrain.rl.history.ledger import UNDECIDED, Commit, Entry, Ledger
from posttrain.rl.history.replies import unpack
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Group, GroupState, ScoredGroup, make_group
from posttrain.sampling.rollouts import Reply, up_to

CHECKPOINTS = "checkpoints"
MODEL = "model"
LAST_CHECKPOINT = "last_checkpoint"  # the fact that keeps its commit beside that of the result, of the same version
SNAPSHOT = "ledger.sqlite"
_READ_BYTES = 1 << 24
_SCORES = ("rewards", "reasons", "advantages", "outcomes", "ref_logprobs", "turn_advantages")


@dataclass(frozen=True, slots=True)
class Survivor:
    """An undecided group of before a crash: neither trained on nor dropped.

    stamp: the policy version of its oldest token; if it has no token, the version from which it may be sampled.
    replies: what is left of its replies. group: set if all of them are finished. scored: set if they have rewards too.
    """

    entry: Entry
    stamp: int
    replies: tuple[Reply, ...] = ()
    group: Group | None = None
    scored: ScoredGroup | None = None


def open_ledger(folder: Path) -> Ledger:
    """The stage's ledger. If the file is missing, it is restored from the copy in the newest checkpoint."""
    checkpoints = sorted((folder / CHECKPOINTS).glob("step_*"), key=version_of, reverse=True)
    path = folder / SNAPSHOT
    if path.exists() or not checkpoints or not (checkpoints[0] / SNAPSHOT).exists():
        return Ledger(path)
    # The copy was made before its checkpoint was complete, so it has no commit of this checkpoint yet.
    commit = Commit(version_of(checkpoints[0]), f"{CHECKPOINTS}/{checkpoints[0].name}", folder_hash(checkpoints[0]))
    shutil.copyfile(checkpoints[0] / SNAPSHOT, path)
    ledger = Ledger(path)
    asyncio.run(ledger.commit(commit, 0))
    return ledger


def finished_outputs(folder: Path, steps: int) -> dict[str, Any] | None:
    """The outputs of a stage that was killed after its result was committed; None if the result is not committed."""
    if not (folder / SNAPSHOT).exists():
        return None
    ledger = Ledger(folder / SNAPSHOT)
    try:
        commit = ledger.last_commit()
        if commit is None or (commit.version, commit.folder) != (steps, MODEL):
            return None
        if folder_hash(folder / MODEL) != commit.hash:
            return None
        return ledger.fact("outputs")
    finally:
        ledger.close()


def rl_stages(run_dir: Path) -> Sequence[Path]:
    """The folders of a run's RL stages: `run_dir` if it is one itself, else those in it.

    Raises ConfigError if there are none.
    """
    if (run_dir / SNAPSHOT).exists():
        return [run_dir]
    found = sorted(path.parent for path in run_dir.glob(f"*/{SNAPSHOT}"))
    if not found:
        raise ConfigError(str(run_dir), [f"holds no RL stage: there is no {SNAPSHOT} in it or in its folders"])
    return found


def version_of(checkpoint: Path) -> int:
    """The policy version of a checkpoint, from the name of its folder (step_40: 40)."""
    return int(checkpoint.name.removeprefix("step_"))


async def commit_result(folder: Path, ledger: Ledger) -> None:
    """Commit the stage's model as its result. The last checkpoint, of the same version, is remembered."""
    last = ledger.last_commit()
    assert last is not None  # the last version has a checkpoint
    if last.folder != MODEL:
        ledger.set_fact(LAST_CHECKPOINT, [last.version, last.folder, last.hash])
    await ledger.commit(Commit(last.version, MODEL, folder_hash(folder / MODEL)), ledger.seq)


def last_checkpoint(folder: Path, ledger: Ledger) -> Path | None:
    """The folder that the last commit names, or None without a commit. Every other checkpoint is removed.

    Where the last commit names the result of a finished stage, it is the checkpoint that the result was written with.
    Raises StageError if the folder is missing or its content is not what was committed.
    """
    commit = ledger.last_commit()
    if commit is not None and commit.folder == MODEL:  # a finished stage that goes on, with more steps
        commit = Commit(*ledger.fact(LAST_CHECKPOINT))
    named = folder / commit.folder if commit is not None else None
    for other in (folder / CHECKPOINTS).glob("*"):
        if other != named:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    if commit is None or named is None:
        return None
    if not named.is_dir() or folder_hash(named) != commit.hash:
        state = "damaged: its content is not what was committed" if named.is_dir() else "missing"
        raise StageError(f"{named} is {state}; restore it, or remove {folder} to start again")
    return named


def folder_hash(folder: Path) -> str:
    """A hash of the names and contents of all files in a folder, as 32 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        one = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                one.update(chunk)
        total.update(f"{path.relative_to(folder).as_posix()}\0{one.hexdigest()}\n".encode())
    return total.hexdigest()


def scores_json(scored: ScoredGroup) -> dict[str, Any]:
    """The scores of a group, as the ledger keeps them in JSON."""
    return {name: getattr(scored, name) for name in _SCORES}


def scored_from_json(group: Group, scores: dict[str, Any]) -> ScoredGroup:
    """The inverse of `scores_json`."""
    references = tuple(tuple(values) for values in scores["ref_logprobs"])
    turns = tuple(tuple(values) for values in scores.get("turn_advantages", ()))
    outcomes = tuple(Outcome(name) for name in scores["outcomes"])
    others = {name: tuple(scores[name]) for name in ("rewards", "reasons", "advantages")}
    return ScoredGroup(group, **others, outcomes=outcomes, ref_logprobs=references, turn_advantages=turns)


def group_of(entry: Entry, source: PromptSource) -> Group:
    """The group of an entry whose replies are all sampled."""
    assert entry.data is not None
    prompt = source.prompt(entry.prompt_id, entry.system)
    return make_group(entry.id, prompt, unpack(entry.data))


def survivors(ledger: Ledger, source: PromptSource, version: int) -> list[Survivor]:
    """Every undecided group, the lowest stamp first. version: that of the commit from which the run continues."""
    found = [_survivor(entry, source, version) for entry in ledger.entries(UNDECIDED, with_data=True)]
    return sorted(found, key=lambda item: (item.stamp, item.entry.id))


def _survivor(entry: Entry, source: PromptSource, version: int) -> Survivor:
    replies = tuple(up_to(reply, version) for reply in unpack(entry.data)) if entry.data else ()
    stamps = [span.policy_version for reply in replies for segment in reply.segments for span in segment.versions]
    if not stamps:
        return Survivor(entry, version)
    if any(not reply.finish_reason for reply in replies):
        return Survivor(entry, min(stamps), replies)
    group = group_of(entry, source)
    if entry.state != GroupState.SCORED or entry.scores is None:
        return Survivor(entry, min(stamps), replies, group)
    return Survivor(entry, min(stamps), replies, group, scored_from_json(group, json.loads(entry.scores)))
