"""The ledger by itself: its content after a crash at any moment, what counts as a commit, what an audit finds."""

import asyncio
import json
import random
import re
import sqlite3
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.cli.audit import print_audits
from posttrain.config.base import dump_yaml
from posttrain.config.rewards import SystemsConfig
from posttrain.errors import CheckpointError, StageError
from posttrain.pipeline.rundir import DONE, RunDir, is_running
from posttrain.records import DrawnPrompt, FinishReason, Message, Prompt, Rollout, Row, Segment, VersionSpan
from posttrain.rl.history.archive import RolloutArchive, check_archive, recorded_rollout
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.ledger import Commit, Ledger
from posttrain.rl.history.recovery import (
    SNAPSHOT,
    folder_hash,
    group_of,
    last_checkpoint,
    open_ledger,
    scored_from_json,
    scores_json,
    survivors,
)
from posttrain.rl.history.replay import recorded_steps
from posttrain.rl.history.replies import pack, unpack
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Group, GroupState, LedgerEvent, ScoredGroup
from posttrain.rl.training.samples import train_sample
from posttrain.sampling.rollouts import UNBEGUN, Reply, up_to

ROWS = [Row(f"p{index}", "math", (Message("user", f"question {index}"),), "1") for index in range(40)]


def reply(*spans, finish="stop"):
    """A reply of spans (version, tokens)."""
    versions, end = [], 0
    for version, count in spans:
        versions.append(VersionSpan(version, end, end + count))
        end += count
    ids = tuple(range(3, 3 + end))
    segment = Segment(ids, True, tuple(-0.1 * (token + 1 / 3) for token in ids), tuple(versions))
    return Reply((segment,), "text é", FinishReason(finish))


def source():
    return PromptSource(ROWS, SystemsConfig(), lambda row, messages: [1, 2, len(messages[-1].content)], seed=0)


class Tokenizer:
    def decode(self, ids):
        return f"<{ids[0]}>"


def test_a_flush_waits_for_what_a_cancelled_one_took(tmp_path):
    """The controller's own flushing is cancelled at its end, perhaps while its thread writes."""

    async def run():
        ledger = Ledger(tmp_path / "ledger.sqlite")
        ledger.reserve(0, "p0", "math", system=None, prompts_seen=1, stamp=0)
        other = sqlite3.connect(ledger.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # as long as another process writes, no flush can end
        first = asyncio.create_task(ledger.flush())
        await asyncio.sleep(0)  # it has taken what there was, and waits for its thread
        first.cancel()
        second = asyncio.create_task(ledger.flush())
        done, _ = await asyncio.wait({first, second}, timeout=0.1)
        assert done == {first}
        other.execute("ROLLBACK")
        other.close()
        await second
        found = [entry.id for entry in ledger.entries()]
        ledger.close()
        return found

    assert asyncio.run(run()) == [0]


@pytest.mark.parametrize("seed", range(8))
def test_changes_that_are_written_together_end_as_those_that_are_written_one_by_one(tmp_path, seed):
    """Random transitions of a few groups; some changes are of no single group."""
    chance = random.Random(seed)
    ledgers = [Ledger(tmp_path / name) for name in ("together", "apart")]
    for step in range(150):
        order = chance.randrange(6)
        name, *arguments = chance.choice(
            [
                ("generated", order, [reply((step, 3)), reply((step, 2))]),
                ("scored", order, {"rewards": [step]}),
                ("dropped", order, f"reason {step}"),
                ("restart_group", order, step, chance.choice([[], [reply((step, 1))]])),
                ("trained", [order, (order + 1) % 6], step),
                ("set_fact", "step", step),
                ("forget_from", order),
                ("reserve", order),
            ]
        )
        for ledger in ledgers:
            if name == "reserve":
                if any(entry.id == order for entry in (ledger.flush_now(), ledger.entries())[1]):
                    continue
                ledger.reserve(order, f"p{step}", "math", system=None, prompts_seen=step, stamp=step)
            else:
                getattr(ledger, name)(*arguments)
        ledgers[1].flush_now()
    found = []
    for ledger in ledgers:
        ledger.flush_now()
        log = [(seq, event, group, value) for seq, _, event, group, value in ledger.log()]
        found.append((ledger.entries(with_data=True), log))
        ledger.close()
    assert found[0] == found[1]
    assert len(found[0][1]) > 100


def test_a_flush_makes_few_statements_however_many_groups_have_changed(tmp_path):
    """After each statement its thread waits for Python's lock, up to five milliseconds while the event loop works."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    made: list[str] = []
    ledger._file._connection.set_trace_callback(made.append)
    for order in range(200):
        ledger.reserve(order, f"p{order}", "math", system=None, prompts_seen=order, stamp=0)
        ledger.generated(order, [reply((0, order + 1))])
        ledger.scored(order, {"rewards": [order]})
    ledger.flush_now()
    ledger._file._connection.set_trace_callback(None)
    assert len(made) < 50
    found = [(entry.id, entry.state, entry.tokens, entry.scores) for entry in ledger.entries(with_data=True)]
    assert found == [(order, "scored", order + 1, f'{{"rewards":[{order}]}}') for order in range(200)]
    ledger.close()


def test_replies_come_back_as_they_were():
    replies = [reply((0, 3), (2, 4)), reply((1, 5), finish="length"), UNBEGUN]
    assert list(unpack(pack(replies))) == replies


@pytest.mark.parametrize(("version", "kept"), [(0, 3), (1, 3), (2, 7), (3, 9), (9, 9)])
def test_tokens_of_versions_that_are_gone_are_taken_away(version, kept):
    whole = reply((0, 3), (2, 4), (3, 2))
    left = up_to(whole, version)
    (segment,) = left.segments
    assert len(segment.token_ids) == len(segment.sampler_logprobs) == kept
    assert left.finish_reason == ("stop" if kept == 9 else "")
    assert [span.end for span in segment.versions][-1:] == [kept]
    assert whole.segments[0].token_ids[:kept] == segment.token_ids


def walk(ledger: Ledger, order: int, until: str, step: int = 0, versions=((0, 4),)):
    """Take a group from its reservation to a state."""
    prompts = source()
    ledger.reserve(order, f"p{order}", "math", system=None, prompts_seen=order + 1, stamp=versions[0][0])
    if until == "reserved":
        return
    replies = [reply(*versions), reply(*versions)]
    ledger.generated(order, replies)
    if until == "generated":
        return
    ledger.flush_now()
    group = group_of(next(e for e in ledger.entries(("generated",), with_data=True) if e.id == order), prompts)
    ledger.scored(order, scores_json(ScoredGroup(group, (1.0, 0.0), ("", "no"), (0.5, -0.5), ("scored", "scored"))))
    if until == "dropped":
        ledger.dropped(order, "zero_advantage")
    if until == "trained":
        ledger.trained([order], step)


def states(ledger):
    return {entry.id: entry.state for entry in ledger.entries()}


def test_after_a_crash_every_group_is_where_it_was_and_undone_steps_are_scored_again(tmp_path):
    ledger = Ledger(tmp_path / SNAPSHOT)
    for order, state in enumerate(["trained", "trained", "scored", "dropped", "generated", "reserved", "trained"]):
        walk(ledger, order, state, step=0 if order < 2 else 1, versions=((0, 4),) if order != 6 else ((0, 2), (2, 2)))
    ledger.sampled_so_far(5, [reply((0, 2), (1, 3), finish=""), UNBEGUN])
    asyncio.run(ledger.commit(Commit(1, "checkpoints/step_1", "hash"), 0))
    ledger.dropped(4, "never written")  # a SIGKILL comes before the next flush
    crashed = Ledger(tmp_path / SNAPSHOT)
    assert states(crashed) == {
        0: "committed", 1: "committed", 2: "scored", 3: "dropped", 4: "generated", 5: "reserved", 6: "trained"
    }  # fmt: skip
    undone = crashed.roll_back(1)
    assert (undone.steps, undone.groups) == (1, 1)
    found = {item.entry.id: item for item in survivors(crashed, source(), 1)}
    assert set(found) == {2, 4, 5, 6}
    assert found[2].scored is not None
    assert found[2].scored.rewards == (1.0, 0.0)
    assert found[2].scored.group.rollouts[1].token_ids == (3, 4, 5, 6)
    assert found[4].scored is None
    assert found[4].group is not None
    assert [part.num_sampled for part in found[5].replies] == [5, 0]
    assert found[5].stamp == 0
    # Group 6 was finished by version 2, which is gone: it goes on from what version 0 sampled.
    assert found[6].scored is found[6].group is None
    rest = [part.segments[0] for part in found[6].replies]
    assert [(len(part.token_ids), whole.finish_reason) for part, whole in zip(rest, found[6].replies, strict=True)] == [
        (2, FinishReason.RUNNING)
    ] * 2


def test_what_was_committed_is_never_undone(tmp_path):
    ledger = Ledger(tmp_path / SNAPSHOT)
    for order in range(4):
        walk(ledger, order, "trained", step=order)
    asyncio.run(ledger.commit(Commit(2, "checkpoints/step_2", "hash"), 0))
    ledger.roll_back(2)
    assert states(ledger) == {0: "committed", 1: "committed", 2: "scored", 3: "scored"}
    assert [entry.data is None for entry in ledger.entries(with_data=True)] == [True, True, False, False]
    assert ledger.next_order == 4
    ledger.forget_from(2)
    assert ledger.next_order == 2


def test_a_commit_removes_the_replies_that_are_needed_no_more(tmp_path):
    def with_replies(ledger):
        return [entry.id for entry in ledger.entries(with_data=True) if entry.data is not None]

    ledger = Ledger(tmp_path / SNAPSHOT)
    for order, state in enumerate(["trained", "dropped", "scored", "dropped", "trained"]):
        walk(ledger, order, state, step=order)
    seq_of = {(event, order): seq for seq, _, event, order, _ in (ledger.flush_now(), ledger.log())[1]}
    # The archive has what was dropped up to group 1. Group 4 was trained on after the checkpoint.
    asyncio.run(ledger.commit(Commit(4, "checkpoints/step_4", "hash"), seq_of["dropped", 1]))
    assert with_replies(ledger) == [2, 3, 4]
    assert states(ledger) == {0: "committed", 1: "dropped", 2: "scored", 3: "dropped", 4: "trained"}
    asyncio.run(ledger.commit(Commit(5, "checkpoints/step_5", "hash"), seq_of["dropped", 3]))
    assert with_replies(ledger) == [2]
    walk(ledger, 5, "dropped")
    ledger.close()
    again = Ledger(tmp_path / SNAPSHOT)  # the replies of what an earlier life dropped are removed too
    asyncio.run(again.commit(Commit(6, "checkpoints/step_6", "hash"), again.seq))
    assert with_replies(again) == [2]


def checkpoint(folder: Path, version: int, text: str = "weights") -> Path:
    path = folder / "checkpoints" / f"step_{version}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(text)
    return path


def test_a_checkpoint_that_no_commit_names_is_removed_and_a_damaged_one_is_refused(tmp_path):
    ledger = Ledger(tmp_path / SNAPSHOT)
    assert last_checkpoint(tmp_path, ledger) is None
    good, half = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / ".step_6.writing").mkdir()
    asyncio.run(ledger.commit(Commit(2, "checkpoints/step_2", folder_hash(good)), 0))
    assert last_checkpoint(tmp_path, ledger) == good
    assert not half.exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]
    (good / "model.safetensors").write_text("weightz")
    with pytest.raises(StageError, match="step_2 is damaged: its content is not what was committed"):
        last_checkpoint(tmp_path, ledger)
    (good / "model.safetensors").unlink()
    good.rmdir()
    with pytest.raises(StageError, match="step_2 is missing"):
        last_checkpoint(tmp_path, ledger)


def test_a_lost_ledger_is_restored_from_the_checkpoint(tmp_path):
    ledger = Ledger(tmp_path / SNAPSHOT)
    for order in range(4):
        walk(ledger, order, "trained", step=order)
    path = checkpoint(tmp_path, 2)
    asyncio.run(ledger.snapshot(path / SNAPSHOT))
    ledger.close()
    for file in tmp_path.glob(f"{SNAPSHOT}*"):
        file.unlink()
    restored = open_ledger(tmp_path)
    assert last_checkpoint(tmp_path, restored) == path
    assert states(restored) == {0: "committed", 1: "committed", 2: "trained", 3: "trained"}


def test_a_file_that_is_no_ledger_is_told(tmp_path):
    (tmp_path / SNAPSHOT).write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(StageError, match=r"ledger.sqlite is no ledger that can be read \(file is not a database\)"):
        Ledger(tmp_path / SNAPSHOT)


# --- the audit ---


@pytest.fixture
def finished(tmp_path):
    """A stage of three steps of two groups, committed; one group was dropped."""
    (tmp_path / "config.yaml").write_text(dump_yaml({"groups_per_step": 2, "max_staleness": 2}))
    ledger = Ledger(tmp_path / SNAPSHOT)
    archive = RolloutArchive(tmp_path / "rollouts", Tokenizer())
    for step in range(3):
        for order in (2 * step, 2 * step + 1):
            walk(ledger, order, "trained", step=step, versions=((max(0, step - 1), 3), (step, 2)))
            ledger.flush_now()
            entry = next(e for e in ledger.entries(("trained",), with_data=True) if e.id == order)
            scores = {
                "rewards": [1.0, 0.0],
                "reasons": ["", ""],
                "advantages": [0.5, -0.5],
                "outcomes": ["scored", "scored"],
            }
            scored = scored_from_json(group_of(entry, source()), {**scores, "ref_logprobs": []})
            archive.add(scored, step=step, trainer_version=step, status="trained")
        archive.write(step)
        archive.wait()
    walk(ledger, 6, "dropped")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    ledger.event(LedgerEvent.FINISHED, 3)
    asyncio.run(ledger.commit(Commit(3, "model", folder_hash(tmp_path / "model")), ledger.seq))
    ledger.close()
    return tmp_path


def edit(stage, sql):
    with sqlite3.connect(stage / SNAPSHOT) as connection:
        connection.execute(sql)
    connection.close()


def rewrite(stage, step, change):
    path = stage / "rollouts" / f"step_{step:06d}.parquet"
    rows = [change(row) for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


def test_an_audit_says_whether_more_is_to_come(finished, capsys):
    stage = finished / "run" / "rl"
    stage.mkdir(parents=True)
    for path in [path for path in finished.iterdir() if path.name != "run"]:
        path.rename(stage / path.name)
    run = RunDir(stage.parent)
    for state, words in (("not finished", "clean so far; the stage is not finished"), ("finished", "clean")):
        assert print_audits(run.path, as_json=False) == 0
        assert capsys.readouterr().out.startswith(f"{stage}: {words}\n")
        print_audits(run.path, as_json=True)
        assert json.loads(capsys.readouterr().out)[0]["state"] == state
        (stage / DONE).write_text("{}")
    (stage / DONE).unlink()
    assert not is_running(run.path)
    with run._locked():
        assert is_running(run.path)
        print_audits(run.path, as_json=False)
        assert capsys.readouterr().out.startswith(f"{stage}: clean so far; the stage is running\n")


def test_the_audit_of_a_clean_run_finds_nothing(finished):
    audit = audit_stage(finished)
    assert audit.is_clean, audit.problems
    totals = audit.totals
    assert (totals["groups"], totals["committed"], totals["dropped:zero_advantage"], totals["steps"]) == (7, 6, 1, 3)
    assert (totals["lost"], totals["trained_twice"], totals["tokens_trained"]) == (0, 0, 60)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda s: edit(s, "DELETE FROM groups WHERE id = 3"), "1 dispatched groups are missing from the ledger: [3]"),
        (lambda s: edit(s, "UPDATE groups SET state = 'scored' WHERE id = 6"), "1 groups are undecided: [6]"),
        (lambda s: edit(s, "UPDATE groups SET step = 1 WHERE id = 0"), "step 0 trained on 1 groups, not 2"),
        (lambda s: edit(s, "DELETE FROM log WHERE id = 2 AND event = 'scored'"), "group 2 was trained after generated"),
        (lambda s: (s / "model" / "model.safetensors").write_text("w"), "content of model is not what the last commit"),
        (
            lambda s: rewrite(s, 2, lambda row: {**row, "group_id": row["group_id"].replace("g4", "g0")}),
            "1 groups were trained twice: ['g0']",
        ),
        (
            lambda s: (s / "rollouts" / "step_000001.parquet").unlink(),
            "trained according to the ledger, but not in the rollouts",
        ),
        (
            lambda s: rewrite(s, 2, lambda row: {**row, "versions": row["versions"].replace("[1,0", "[-1,0")}),
            "tokens with a staleness above max_staleness (2)",
        ),
        (
            lambda s: rewrite(s, 1, lambda row: {**row, "versions": row["versions"].replace("3,5]", "4,5]")}),
            "sampled or trained tokens without exactly one policy version",
        ),
        (
            lambda s: rewrite(s, 1, lambda row: {**row, "sampler_logprobs": [None, *row["sampler_logprobs"][1:]]}),
            "sampled or trained tokens without exactly one policy version",
        ),
    ],
)
def test_an_audit_finds_what_is_wrong(finished, damage, problem):
    damage(finished)
    audit = audit_stage(finished)
    assert not audit.is_clean
    assert any(problem in found for found in audit.problems), audit.problems


UNFINISHED = "DELETE FROM log WHERE event = 'finished'"
ROLLED_BACK = 'INSERT INTO log VALUES (1000, 0, \'rolled_back\', NULL, \'{"to": 1, "steps": 2, "groups": 4}\')'


@pytest.mark.parametrize(
    ("state", "from_group", "events", "unrecorded"),
    [
        ("scored", 4, (UNFINISHED,), 1),  # the file of the last step was written, and then the run was killed
        ("scored", 2, (UNFINISHED, ROLLED_BACK), 2),  # two steps were undone, and then it was killed
        ("scored", 4, (), None),  # but the run is finished
        ("generated", 4, (UNFINISHED,), None),  # but a step trains on no group without its rewards
        ("scored", 2, (UNFINISHED,), None),  # but the step before is always recorded first
    ],
)
def test_rollouts_may_be_ahead_of_the_ledger_by_what_a_kill_explains(finished, state, from_group, events, unrecorded):
    edit(finished, f"UPDATE groups SET state = '{state}', step = NULL WHERE id BETWEEN {from_group} AND 5")
    for event in events:
        edit(finished, event)
    audit = audit_stage(finished)
    assert audit.is_clean == (unrecorded is not None), audit.problems
    if unrecorded is not None:
        assert audit.totals["steps_unrecorded"] == unrecorded
        assert audit.totals["tokens_trained"] == 20 * (3 - unrecorded)
    else:
        assert any("trained according to the rollouts, but not in the ledger" in text for text in audit.problems)


def tool_rollout() -> Rollout:
    """A call, the tool's result, an answer: the second segment is context, the third spans two versions."""
    segments = (
        Segment((5, 6), True, (-0.1, -0.2), (VersionSpan(1, 0, 2),)),
        Segment((8, 9, 10), False),
        Segment((11, 12), True, (-0.3, -0.4), (VersionSpan(1, 0, 1), VersionSpan(2, 1, 2))),
    )
    return Rollout("p0", "g0", 0, Prompt((), (1, 2, 3)), segments, "an answer", FinishReason.STOP)


def test_a_rollout_of_several_turns_is_archived_and_read_back(tmp_path):
    rollout = tool_rollout()
    prompt = DrawnPrompt(ROWS[0], None, Prompt(ROWS[0].messages, (1, 2, 3)))
    group = ScoredGroup(Group(0, prompt, (rollout,)), (1.0,), ("",), (0.5,))
    archive = RolloutArchive(tmp_path, Tokenizer())
    archive.add(group, step=3, trainer_version=3, status="trained")
    archive.write(3)
    archive.wait()
    path = tmp_path / "step_000003.parquet"
    check_archive(path)
    (row,) = pq.read_table(path).to_pylist()
    assert json.loads(row["versions"]) == [[1, 0, 2], [1, 5, 6], [2, 6, 7]]
    assert row["sampler_logprobs"] == [-0.1, -0.2, None, None, None, -0.3, -0.4]
    assert (row["num_tokens"], row["policy_version"], row["staleness"]) == (4, 1, 2)
    assert recorded_rollout(row) == rollout
    sample = train_sample(recorded_rollout(row), 3, 0.5)
    assert sample.token_ids == (1, 2, 3, 5, 6, 8, 9, 10, 11, 12)
    assert sample.trained == ((3, 5), (8, 10))
    assert sample.staleness == (2, 2, 2, 1)


def test_an_archive_that_is_closed_has_written_what_it_was_given(tmp_path):
    prompt = DrawnPrompt(ROWS[0], None, Prompt(ROWS[0].messages, (1, 2, 3)))
    archive = RolloutArchive(tmp_path, Tokenizer())
    archive.add(
        ScoredGroup(Group(0, prompt, (tool_rollout(),)), (1.0,), ("",), (0.5,)),
        step=0,
        trainer_version=0,
        status="trained",
    )

    async def run():
        archive.write(0)
        waiting = asyncio.ensure_future(archive.written())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(run())
    archive.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000.parquet"]


def test_a_file_of_the_archive_that_could_not_be_written_ends_the_run(tmp_path):
    prompt = DrawnPrompt(ROWS[0], None, Prompt(ROWS[0].messages, (1, 2, 3)))
    group = ScoredGroup(Group(0, prompt, (tool_rollout(),)), (1.0,), ("",), (0.5,))
    archive = RolloutArchive(tmp_path / "rollouts", Tokenizer())
    archive.add(group, step=0, trainer_version=0, status="trained")
    (tmp_path / "rollouts").rmdir()
    archive.write(0)
    with pytest.raises(FileNotFoundError):
        archive.wait()
    with pytest.raises(FileNotFoundError):
        archive.write(1)
    with pytest.raises(FileNotFoundError):
        asyncio.run(archive.written())


def test_tokens_of_versions_that_are_gone_take_the_turns_after_them_along():
    reply = Reply(tool_rollout().segments, "an answer", FinishReason.STOP)
    assert up_to(reply, 2) == reply
    left = up_to(reply, 1)
    assert [len(segment.token_ids) for segment in left.segments] == [2, 3, 1]
    assert left.finish_reason == FinishReason.RUNNING
    assert up_to(reply, 0) == Reply((), "", FinishReason.RUNNING)


def test_a_ledger_of_another_format_is_refused(tmp_path):
    Ledger(tmp_path / SNAPSHOT).close()
    edit(tmp_path, "PRAGMA user_version = 0")  # as it was before formats were numbered
    with pytest.raises(CheckpointError, match=r"a ledger of format 1, .* reads format 2. Finish the run"):
        Ledger(tmp_path / SNAPSHOT)


def test_an_archive_of_another_format_is_refused(finished):
    path = finished / "rollouts" / "step_000001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(CheckpointError, match=r"step_000001.parquet holds rollouts of format 1"):
        audit_stage(finished)
    with pytest.raises(CheckpointError, match=r"step_000001.parquet holds rollouts of format 1"):
        list(recorded_steps(finished))


@pytest.mark.parametrize(
    ("written", "field"),
    [
        ([[[], 7, "stop"]], "[0].text"),
        ([[[], "", "stop"], [[], "", "halted"]], "[1].finish_reason"),
        ([[[{"token_ids": [1, "2"], "trained": True}], "", "stop"]], "[0].segments[0].token_ids[1]"),
        ([[[{"token_ids": [1], "trained": 1}], "", "stop"]], "[0].segments[0].trained"),
        ([["", "", "stop"]], "[0].segments"),
    ],
)
def test_replies_that_cannot_be_read_are_refused_by_the_field(written, field):
    with pytest.raises(StageError, match=rf"the ledger holds replies that cannot be read: .* at `{re.escape(field)}`"):
        unpack(msgspec.msgpack.encode(written))


@pytest.mark.parametrize(("column", "value"), [("state", "trianed"), ("stamp", "first"), ("tokens", None)])
def test_a_group_that_cannot_be_read_is_refused_by_the_column(tmp_path, column, value):
    ledger = Ledger(tmp_path / SNAPSHOT)
    walk(ledger, 0, "generated")
    ledger.close()
    with sqlite3.connect(tmp_path / SNAPSHOT) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        if value is None:
            connection.execute("ALTER TABLE groups RENAME COLUMN tokens TO old")
            connection.execute("ALTER TABLE groups ADD COLUMN tokens INTEGER")
        else:
            connection.execute(f"UPDATE groups SET {column} = ?", (value,))
    connection.close()
    ledger = Ledger(tmp_path / SNAPSHOT)
    with pytest.raises(StageError, match=rf"ledger\.sqlite holds a group that cannot be read: .* at `\[0\]\.{column}`"):
        ledger.entries(tuple(GroupState) if column != "state" else ("trianed",))
    ledger.close()
