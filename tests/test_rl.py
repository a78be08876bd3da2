"""The RL stage on a tiny random policy, with a real engine, trainer and reward processes.

The reward is the share of even token ids, which a random policy can reach by chance. So the rewards in a group differ,
and training can raise them.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gone import is_gone
from tiny_policy import ENGINE

from posttrain.config.base import dump_yaml, validate_config
from posttrain.context import StageContext
from posttrain.errors import ConfigError, StageError
from posttrain.files import read_jsonl
from posttrain.records import Message, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.replay import replay, weight_gaps
from posttrain.rl.prompts.band import select_band
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.kept import KeptPrompts
from posttrain.rl.prompts.quotas import mixture_shares, places
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import EQUAL_REWARDS

REWARD = '''
def even_share(rollout, row):
    """Share of even token ids, and so little more that no two replies are alike; a row may ask for one that is flat, or
    for one that cannot be scored."""
    if row.fields.get("flat"):
        return 0.0
    match row.fields.get("fails"):
        case "none": return None
        case "nan": return float("nan")
        case "raise": raise KeyError("tests")
        case "hang":
            while True: pass
    ids = rollout.token_ids
    return sum(token % 2 == 0 for token in ids) / len(ids) + 1e-3 * (sum(token * token for token in ids) % 997) / 997
'''


def rows_of(capabilities, n=12, **fields):
    return [
        {
            "id": f"{name}-{index}",
            "capability": name,
            "messages": [{"role": "user", "content": f"{name} {index}"}],
            **fields,
        }
        for name in capabilities
        for index in range(n)
    ]


def make_config(folder: Path, model: Path, rows, **changes):
    (folder / "reward.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "reward": {"name": f"{folder}/reward.py:even_share"},
        "steps": 6,
        "groups_per_step": 4,
        "group_size": 4,
        "max_staleness": 3,
        "sampling": {"max_tokens": 32},
        "optimizer": {"learning_rate": 1e-4},
        "engine": ENGINE,
        "resources": {"rollout": {"cpus": 0.5}},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def run_stage(config, folder: Path, warm=True):
    from posttrain.rl.stage import run

    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    context = StageContext("rl", folder, folder / "events.jsonl", seed=3, warm_engines=warm)
    return run(config, context), list(read_jsonl(folder / "metrics.jsonl"))


def check_what_could_not_be_scored(folder: Path, outputs, metrics):
    """Seven of 27 prompts, in the profile: told as an alarm, in the progress, the metrics, the summary and the file."""
    events = list(read_jsonl(folder / "events.jsonl"))
    (alarm,) = [event for event in events if event["event"] in ("alarm", "unscored")]
    assert alarm["event"] == "alarm"
    kinds = "(none 3, nan 2, KeyError 1, unscorable 1)"
    assert alarm["text"].startswith(f"profile: 7 of 27 prompts could not be scored {kinds}, e.g. row none-math-")
    profiled = [e for e in events if e["event"] == "progress" and e["values"].get("phase") == "pass@k profile"]
    assert (profiled[-1]["done"], profiled[-1]["total"], profiled[-1]["values"]["unscored"]) == (27, 27, 7)
    late = [event for event in profiled if "reward:" in event["values"]]
    assert late[0]["done"] < 27  # while the reward hangs
    assert any(event["values"]["reward:"].endswith("so far, e.g. hang-math-0") for event in late)
    estimates = pq.read_table(folder / "difficulty.parquet").to_pylist()
    assert [row["prompt_id"] for row in estimates if row["unscored"] == "unscorable"] == ["hang-math-0"]
    assert {(row["n"], row["pass_rate"]) for row in estimates if row["unscored"]} == {(0, None)}
    assert (outputs["profile"]["prompts_unscored"], outputs["profile"]["prompts"]) == (7, 27)
    assert outputs["unscored_replies"] == {"training": 0, "evaluations": 0}
    assert all(line["prompts_set_aside"] == 7 for line in metrics)
    names = {row["prompt_id"].partition("-")[0] for row in read_rollouts(folder)}
    assert names == {"flat", "math"}  # none of them is trained on


def read_rollouts(folder: Path):
    return [row for path in sorted((folder / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_rollouts_straddle_updates_within_the_staleness_bound(ranks, tiny_model, tmp_path):
    """Replies much longer than a trainer step are trained with the versions that sampled them, token by token."""
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math", "coding"]),
        sampling={"max_tokens": 120},
        steps=8,
        groups_per_step=2,
        mixture={"math": 3, "coding": 1},
    )
    outputs, metrics = run_stage(config, tmp_path / "rl")
    rollouts = read_rollouts(tmp_path / "rl")
    trained = [row for row in rollouts if row["status"] == "trained"]
    assert [line["step"] for line in metrics] == list(range(8))
    assert len(trained) == 8 * 2 * 4
    several = 0
    for row in trained:
        spans = json.loads(row["versions"])
        assert spans[0][1] == 0
        assert spans[-1][2] == row["num_tokens"]
        assert all(before[2] == after[1] for before, after in itertools.pairwise(spans))
        assert row["policy_version"] == min(version for version, _, _ in spans)
        assert 0 <= row["step"] - row["policy_version"] <= config.max_staleness
        several += len({version for version, _, _ in spans}) >= 2
    assert several >= 4, "no trained reply carries two policy versions"
    assert max(line["staleness_max"] for line in metrics) <= config.max_staleness
    for line in metrics:
        by_age = {int(name.partition("/")[2]): count for name, count in line.items() if name.startswith("staleness/")}
        assert sum(by_age.values()) == 2
        assert max(by_age) == line["staleness_max"]
        idle = [share for name, share in line.items() if name.startswith("idle/")]
        assert len(idle) == 3  # trainer, engine, reward
        assert all(0 <= share <= 1 for share in idle)
        assert 0 <= line["queue_age_s_mean"] <= line["queue_age_s_max"]
    # Places of two groups a step, three of four for math: m c | m m | m c | ...
    by_step = defaultdict(set)
    for row in trained:
        by_step[row["step"]].add((row["group_id"], row["capability"]))
    math = [Counter(name for _, name in by_step[step])["math"] for step in range(8)]
    expected = Counter(islice(places({"coding": 0.25, "math": 0.75}), 16))
    assert sum(math) == expected["math"] == 12
    assert all(count in (1, 2) for count in math)
    # The trained policy is a whole model folder and differs from the start.
    from posttrain.model.load import load_model

    before, after = load_model(tiny_model).state_dict(), load_model(outputs["model"]).state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    assert metrics[-1]["mismatch_kl"] < 0.5


@pytest.mark.slow
def test_groups_that_grow_too_old_are_dropped_where_nobody_waits(ranks, tiny_model, tmp_path):
    """Replies much longer than a trainer step with `staleness: drop`; running replies keep their KV cache."""
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math", "coding"]),
        sampling={"max_tokens": 120},
        steps=6,
        groups_per_step=2,
        max_staleness=1,
        staleness="drop",
        weights={"kv": "keep", "order": "one_by_one"},
    )
    _, metrics = run_stage(config, tmp_path / "rl")
    assert max(line["staleness_max"] for line in metrics) <= 1
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems
    stale = sum(line["groups_dropped_stale"] for line in metrics)
    assert stale <= audit.totals.get("dropped:stale", 0)  # the last ones may come after the last line
    assert sum(audit.totals[state] for state in ("committed", "dropped")) == audit.totals["groups"]


@pytest.mark.slow
def test_groups_that_teach_nothing_are_replaced_and_the_selection_leaves_their_prompts_alone(
    ranks, tiny_model, tmp_path
):
    rows = rows_of(["math"], 10) + [row | {"id": f"flat-{row['id']}"} for row in rows_of(["math"], 10, flat=True)]
    failing = [("none", 3), ("nan", 2), ("raise", 1), ("hang", 1)]
    rows += [row | {"id": f"{how}-{row['id']}"} for how, n in failing for row in rows_of(["math"], n, fails=how)]
    config = make_config(
        tmp_path,
        tiny_model,
        rows,
        reward={"name": f"{tmp_path}/reward.py:even_share", "timeout_s": 3.0},
        profile={"samples": 2},
        steps=16,
    )
    outputs, metrics = run_stage(config, tmp_path / "rl")
    check_what_could_not_be_scored(tmp_path / "rl", outputs, metrics)
    rollouts = read_rollouts(tmp_path / "rl")
    by_status = defaultdict(set)
    for row in rollouts:
        by_status[row["status"]].add(row["prompt_id"])
    # Groups without any difference in reward are dropped, and others take their place in the batch.
    assert all(line["groups_trained"] == config.groups_per_step for line in metrics)
    equal = [sum(line.get(f"groups_dropped_{reason}", 0) for reason in EQUAL_REWARDS) for line in metrics]
    assert sum(equal) > 0
    assert [line["groups_too_hard"] for line in metrics] == equal
    assert [line["tokens_dropped"] > 0 for line in metrics] == [count > 0 for count in equal]
    dropped = by_status["dropped:zero_advantage"] | by_status["dropped:stopped"]
    assert all(name.startswith("flat-") for name in dropped)
    assert not any(name.startswith("flat-") for name in by_status["trained"])
    # Half the prompts are flat. Each is found out once, and looked at again now and then: in all a quarter or so.
    groups = {row["group_id"]: row["prompt_id"].startswith("flat-") for row in rollouts}
    assert len(groups) >= 64
    assert sum(groups.values()) / len(groups) < 0.42
    assert all(0 < line["prompts_mixed"] < line["prompts_seen"] == 20 for line in metrics)


@pytest.mark.slow
def test_training_raises_the_reward_and_groups_that_teach_nothing_stop_after_their_first_replies(
    ranks, tiny_model, tmp_path
):
    """All coding prompts are flat. Once that is known, their groups end after two replies and others take their place.

    The trained steps are done again from the archive, which has the groups that went on whole.
    """
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"]) + rows_of(["coding"], flat=True),
        steps=14,
        groups_per_step=8,
        mixture={"math": 3, "coding": 1},
        mixture_refills=1,
        selection={"first_replies": 2},
        optimizer={"learning_rate": 1.5e-3},  # at 3e-3 the policy may give one reply alone before the last step
    )
    _, metrics = run_stage(config, tmp_path / "rl")
    first = sum(line["reward_mean"] for line in metrics[:3]) / 3
    last = sum(line["reward_mean"] for line in metrics[-3:]) / 3
    assert last > first + 0.1
    by_group = defaultdict(list)
    for row in read_rollouts(tmp_path / "rl"):
        by_group[row["group_id"]].append(row)
    sizes = defaultdict(set)
    for group in by_group.values():
        sizes[group[0]["status"]].add(len(group))
    assert sizes["trained"] == {4}
    assert sizes["dropped:stopped"] == {2}
    stopped = {group[0]["capability"] for group in by_group.values() if group[0]["status"] == "dropped:stopped"}
    assert "coding" in stopped
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems
    again = tmp_path / "again"
    again.mkdir()
    found = replay(config, StageContext("rl", again, again / "events.jsonl", seed=3), tmp_path / "rl")
    assert (found["batches_equal"], found["weights_equal"]) == (True, True), found


@pytest.mark.slow
def test_engines_follow_a_trainer_of_two_ranks(ranks, tiny_model, tmp_path):
    """Experts divided between the ranks, weights by ZeRO-3: what is published is what the engines must have."""
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"]),
        steps=3,
        max_staleness=0,
        optimizer={"learning_rate": 3e-3},  # with more, three steps can leave no two different replies
        parallel={"processes": 2, "expert": 2, "zero": 3},
        resources={"rollout": {"cpus": 0.5}, "trainer": {"cpus": 0.25}},
    )
    outputs, metrics = run_stage(config, tmp_path / "rl")
    assert (outputs["engine"], outputs["processes"], outputs["expert"]) == ("DeepSpeedEngine", 2, 2)
    assert outputs["parity_mean_gap"] < 1e-5
    # On-policy, after updates that change much: sampler and trainer agree only if every tensor has arrived.
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    assert all(line["expert_load_max"] > 0 for line in metrics)


@pytest.mark.slow
def test_training_is_refused_when_sampler_and_trainer_disagree(ranks, tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model, rows_of(["math"]), parity_tolerance=1e-12)
    with pytest.raises(StageError, match="disagree on the log-probabilities"):
        run_stage(config, tmp_path / "rl")
    assert not (tmp_path / "rl" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_training_stops_when_no_group_has_an_advantage(ranks, tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model, rows_of(["math"], flat=True), stop_after_idle_steps=2)
    with pytest.raises(StageError, match="groups in a row taught nothing"):
        run_stage(config, tmp_path / "rl")


@pytest.mark.slow
def test_training_goes_on_when_an_engine_is_killed_and_when_its_core_freezes(ranks, tiny_model, tmp_path):
    """SIGKILL of the actor, then SIGSTOP of the core of its successor, each with groups in flight."""
    config = make_config(tmp_path, tiny_model, rows_of(["math"]), steps=9, sampling={"max_tokens": 120})
    done = []

    def steps():
        path = tmp_path / "rl" / "metrics.jsonl"
        return len(list(read_jsonl(path))) if path.exists() else 0

    def strike(name, number, after):
        while steps() < after:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended by itself
                if name in " ".join(process.cmdline()) or name in process.name():
                    process.send_signal(number)
                    done.append(process.pid)

    def faults():
        strike("EngineActor", signal.SIGKILL, 2)
        strike("EngineCore", signal.SIGSTOP, 4)

    killer = threading.Thread(target=faults, daemon=True)
    killer.start()
    _, metrics = run_stage(config, tmp_path / "rl")
    assert len(done) >= 2
    assert [line["step"] for line in metrics] == list(range(9))
    reasons = [
        line["reason"] for line in read_jsonl(tmp_path / "rl" / "events.jsonl") if line["event"] == "engine_replaced"
    ]
    # A busy machine may also let a healthy engine miss its deadline: it is replaced too, and nothing is lost.
    assert metrics[-1]["engines_replaced"] == len(reasons) >= 2
    # Without an answer, or of weights standing still: whatever the engine was at.
    assert any(f"{ENGINE['deadline_s']:g} s" in reason for reason in reasons[1:])
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems
    assert audit.totals["engines_replaced"] == len(reasons)
    # What was sampled before the kill is not sampled again: the replies go on elsewhere.
    assert all(is_gone(pid) for pid in done)


@pytest.mark.slow
@pytest.mark.full  # three engines to start
def test_an_engine_that_is_killed_while_it_takes_anothers_place_is_replaced_too(ranks, tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model, rows_of(["math"]), steps=10, sampling={"max_tokens": 200})
    folder = tmp_path / "rl"
    killed = []

    def actors():
        found = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "EngineActor" in " ".join(process.cmdline()) or "EngineActor" in process.name():
                    found[process.pid] = process
        return found

    def kill_new(known):
        while not (new := [process for pid, process in actors().items() if pid not in known]):
            time.sleep(0.02)
        new[0].send_signal(signal.SIGKILL)
        killed.append(new[0].pid)

    def faults():
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        known = actors()
        kill_new({})
        kill_new(known)

    threading.Thread(target=faults, daemon=True).start()
    _, metrics = run_stage(config, folder, warm=False)
    assert len(set(killed)) == 2
    assert [line["step"] for line in metrics] == list(range(10))
    replaced = [line["name"] for line in read_jsonl(folder / "events.jsonl") if line["event"] == "engine_replaced"]
    # A busy machine may also let a healthy engine miss its deadline: it is replaced too, and nothing is lost.
    others = len(replaced) - 2
    assert len(set(replaced)) >= 2
    # The second was lost before it had started, within the first replacing.
    assert metrics[-1]["engines_replaced"] == 1 + others
    audit = audit_stage(folder)
    assert audit.is_clean, audit.problems
    assert all(is_gone(pid) for pid in killed)


@pytest.mark.slow
@pytest.mark.full  # the one that kills an engine freezes a core too
def test_an_engine_that_freezes_while_it_is_idle_is_replaced(ranks, tiny_model, tmp_path, monkeypatch):
    """In a deterministic run nothing is sent to an engine that lacks a version: its taking of weights must find out."""
    from posttrain.sampling.worker_weights import WorkerWeights

    changes = {"engine": {"max_model_len": 256, "kv_cache_gib": 0.1, "deadline_s": 3}}
    rows = rows_of(["math"])
    config = make_config(tmp_path, tiny_model, rows, steps=5, deterministic=True, max_staleness=0, **changes)
    update, frozen = WorkerWeights.update, []

    def freeze_before(self, manifest, version, again=False):
        if version == 3:
            for process in psutil.Process().children(recursive=True):
                if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGSTOP)
                    frozen.append(process)
        return update(self, manifest, version, again)

    monkeypatch.setattr(WorkerWeights, "update", freeze_before)
    _, metrics = run_stage(config, tmp_path / "rl", warm=False)
    assert frozen
    assert not any(process.is_running() for process in frozen)
    assert [line["step"] for line in metrics] == list(range(5))
    assert metrics[-1]["engines_replaced"] >= 1
    assert audit_stage(tmp_path / "rl").is_clean


# Lines of Python, after which a run sends itself SIGKILL at one place.
DIES_BEFORE_THE_LEDGER_HAS_STEP_6 = (
    "write = RolloutArchive._write; RolloutArchive._write = lambda self, step, decided: "
    "(write(self, step, decided), step < 6 or os.kill(os.getpid(), signal.SIGKILL))"
)
DIES_AFTER_THE_LEDGER_HAS_UNDONE_STEPS = (
    "undo = Ledger.roll_back; Ledger.roll_back = lambda self, version: "
    "(undo(self, version), os.kill(os.getpid(), signal.SIGKILL))"
)


def start_run(config, folder: Path, prelude: str = ""):
    """The stage in a process of its own, which may be killed. prelude: a line of Python that it runs first."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    script = textwrap.dedent(f"""
        import os, pathlib, signal
        from posttrain.config.base import load_config
        from posttrain.context import StageContext
        from posttrain.pipeline.ray_session import ray_session
        from posttrain.rl.config import RlConfig
        from posttrain.rl.history.archive import RolloutArchive
        from posttrain.rl.history.ledger import Ledger
        from posttrain.rl.stage import run
        folder = pathlib.Path({str(folder)!r})
        {prelude}
        with ray_session():
            context = StageContext("rl", folder, folder / "events.jsonl", seed=3)
            run(load_config(RlConfig, folder / "config.yaml"), context)
    """)
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder)


def kill_when(child, ready):
    deadline = time.time() + 180
    while time.time() < deadline and not ready():
        assert child.poll() is None, "the run ended too early"
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


@pytest.mark.slow
@pytest.mark.full  # test_rl_faults.py kills more
@pytest.mark.timeout(500)
def test_a_killed_run_continues_from_its_checkpoint(ranks, tiny_model, tmp_path):
    """SIGKILL where ledger and archive differ. The third run goes on from the commit, trains every step once, and can
    be replayed."""
    config = make_config(tmp_path, tiny_model, rows_of(["math"]), steps=24, checkpoint_every=4)
    folder = tmp_path / "rl"
    for prelude, steps, unrecorded in (
        (DIES_BEFORE_THE_LEDGER_HAS_STEP_6, 6, 1),
        (DIES_AFTER_THE_LEDGER_HAS_UNDONE_STEPS, 4, 3),
    ):
        assert start_run(config, folder, prelude).wait(240) == -signal.SIGKILL
        audit = audit_stage(folder)
        assert audit.is_clean, audit.problems
        assert (audit.totals["steps"], audit.totals["steps_unrecorded"]) == (steps, unrecorded)
        (again := tmp_path / f"after {steps}").mkdir()
        found = replay(config, StageContext("rl", again, again / "events.jsonl", seed=3), folder)
        assert (found["batches_equal"], found["steps"]) == (True, steps)
    assert start_run(config, folder).wait(240) == 0
    resumed = [line for line in read_jsonl(folder / "events.jsonl") if line["event"] == "resumed"]
    assert len(resumed) == 1
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == list(range(24))
    trained = Counter(row["step"] for row in read_rollouts(folder) if row["status"] == "trained")
    assert set(trained) == set(range(24))
    assert set(trained.values()) == {16}
    audit = audit_stage(folder)
    assert audit.is_clean, audit.problems
    assert audit.totals["committed"] == 24 * 4
    assert audit.totals["resumed"] == 2
    again = tmp_path / "again"
    again.mkdir()
    found = replay(config, StageContext("rl", again, again / "events.jsonl", seed=3), folder)
    assert found["batches_equal"]
    assert found["weights_equal"], found
    # One rollout trained on at another step, or one advantage changed, and it is told.
    path = folder / "rollouts" / "step_000003.parquet"
    table = pq.read_table(path).to_pylist()
    for row in table:
        row["group_id"] += "0" if row["status"] == "trained" else ""
    pq.write_table(pa.Table.from_pylist(table, schema=pq.read_schema(path)), path)
    assert any("not in the rollouts" in problem for problem in audit_stage(folder).problems)


@pytest.mark.slow
@pytest.mark.full  # three starts of a stage
@pytest.mark.timeout(500)
def test_a_deterministic_run_that_was_killed_equals_one_that_was_not(ranks, tiny_model, tmp_path):
    """Bit for bit: the weights, and every rollout that was trained on."""
    rows = rows_of(["math"], 10) + [row | {"id": f"flat-{row['id']}"} for row in rows_of(["math"], 4, flat=True)]
    config = make_config(tmp_path, tiny_model, rows, steps=8, checkpoint_every=3, max_staleness=0, deterministic=True)
    run_stage(config, tmp_path / "whole")  # on a warm engine, which matters no more than the rest
    folder = tmp_path / "killed"
    child = start_run(config, folder)
    kill_when(child, lambda: (folder / "rollouts" / "step_000004.parquet").exists())
    assert start_run(config, folder).wait(240) == 0
    assert [line["step"] for line in read_jsonl(folder / "events.jsonl") if line["event"] == "resumed"] == [3]
    assert weight_gaps(tmp_path / "whole" / "model", folder / "model") == {}
    assert weight_gaps(tiny_model, folder / "model") != {}
    names = ("step", "group_id", "index", "status", "token_ids", "sampler_logprobs", "advantage")
    whole, killed = (
        [tuple(str(row[name]) for name in names) for row in read_rollouts(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert sorted(whole) == sorted(killed)
    assert any(row[3].startswith("dropped") for row in whole)  # with waves that were refilled
    assert audit_stage(folder).is_clean


@pytest.fixture(scope="module")
def deterministic(tiny_model, tmp_path_factory):
    """`make(steps)`: the config of a small deterministic run."""
    folder = tmp_path_factory.mktemp("deterministic")

    def make(steps):
        return make_config(
            folder, tiny_model, rows_of(["math"], 8), steps=steps, groups_per_step=2, checkpoint_every=50,
            max_staleness=0, deterministic=True, sampling={"max_tokens": 16}, profile={"samples": 2},
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def longer(ranks, deterministic, tmp_path_factory):
    """A stage that was finished after two steps and then asked for a third. Also what was there after two."""
    folder = tmp_path_factory.mktemp("longer") / "rl"
    run_stage(deterministic(2), folder)
    kept = [folder / "difficulty.parquet", *sorted((folder / "rollouts").glob("step_00000[01].parquet"))]
    before = {path: path.read_bytes() for path in kept}
    outputs, metrics = run_stage(deterministic(3), folder)
    assert outputs["steps"] == 3
    assert [line["step"] for line in metrics] == [0, 1, 2]
    return folder, before


@pytest.mark.slow
def test_more_steps_go_on_from_the_end_of_a_finished_stage(longer):
    folder, before = longer
    assert [line["step"] for line in read_jsonl(folder / "events.jsonl") if line["event"] == "resumed"] == [2]
    assert len(before) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Counter(row["step"] for row in read_rollouts(folder) if row["status"] == "trained") == {0: 8, 1: 8, 2: 8}
    audit = audit_stage(folder)
    assert audit.is_clean, audit.problems


@pytest.mark.slow
@pytest.mark.full  # test_sft.py compares weights too
def test_more_steps_give_the_weights_of_a_longer_run(longer, deterministic, tiny_model, tmp_path):
    """Bit for bit; and again when the model is lost, which is written from the last checkpoint then."""
    folder, _ = longer
    run_stage(deterministic(3), tmp_path / "whole")
    assert weight_gaps(tmp_path / "whole" / "model", folder / "model") == {}
    assert weight_gaps(tiny_model, folder / "model") != {}
    shutil.rmtree(folder / "model")
    run_stage(deterministic(3), folder)
    assert weight_gaps(tmp_path / "whole" / "model", folder / "model") == {}
    assert audit_stage(folder).is_clean


def row_named(name, capability="math"):
    return Row(name, capability, (Message("user", name),))


def source_of(rows, seed=0, instructions=()):
    from posttrain.config.rewards import SystemsConfig

    systems = validate_config(SystemsConfig, {"instructions": list(instructions)}, "test")
    return PromptSource(rows, systems, lambda row, messages: [len(m.content) for m in messages], seed=seed)


def test_every_prompt_is_seen_once_a_pass():
    source = source_of([row_named(f"p{i}") for i in range(9)])
    assert Counter(source.draw("math", order).row.id for order in range(27)) == Counter({f"p{i}": 3 for i in range(9)})


def test_a_prompt_that_was_rendered_before_is_not_rendered_again():
    from posttrain.config.rewards import SystemsConfig

    rows = [row_named(f"p{i}") for i in range(8)]
    rendered = []

    def render(row, messages):
        rendered.append([message.role for message in messages])
        return [9, 9]

    kept = KeptPrompts(rows, [(i, i + 1) for i in range(8)], render)
    systems = validate_config(
        SystemsConfig, {"instructions": [{"text": "Be brief.", "weight": 1.0}, {"text": "", "weight": 1.0}]}, "test"
    )
    source = PromptSource(rows, systems, kept, seed=0)
    drawn = [source.draw("math", order) for order in range(64)]
    plain = [prompt for prompt in drawn if prompt.system is None]
    assert {prompt.prompt.token_ids for prompt in plain} == {(i, i + 1) for i in range(8)}
    assert all(prompt.prompt.token_ids[0] == int(prompt.row.id[1:]) for prompt in plain)
    assert rendered == [["system", "user"]] * (len(drawn) - len(plain))
    assert 0 < len(plain) < len(drawn)


def test_draws_go_on_after_a_checkpoint_and_after_groups_dispatched_since():
    rows = [row_named(f"{name}{i}", name) for name in ("math", "coding") for i in range(5)]
    instructions = [{"text": "Be brief.", "weight": 1.0}, {"text": "", "weight": 2.0}]
    first, second = source_of(rows, 5, instructions), source_of(rows, 5, instructions)
    draws = list(enumerate(["math", "coding"] * 10))
    for order, capability in draws[:7]:
        first.draw(capability, order)
    second.restore(json.loads(json.dumps(first.state())))
    for order, capability in draws[7:12]:
        first.draw(capability, order)
    for capability in ("math", "coding"):
        second.was_drawn(capability, f"{capability}0", first.prompts_seen(capability))
    drawn = [first.draw(name, order) for order, name in draws[12:]]
    assert drawn == [second.draw(name, order) for order, name in draws[12:]]
    assert drawn != [source_of(rows, 6, instructions).draw(name, order) for order, name in draws[12:]]


def test_the_state_of_a_checkpoint_stays_as_it_was_while_prompts_are_drawn():
    """A checkpoint is written while the next groups are dispatched."""
    source = source_of([row_named(f"p{i}") for i in range(5)])
    source.draw("math", 0)
    state = source.state()
    before = json.dumps(state)
    for order in range(1, 4):
        source.draw("math", order)
    assert json.dumps(state) == before
    assert json.dumps(source.state()) != before


def test_system_instructions_follow_their_weights_and_spare_prompts_that_bring_one():
    own = Row("own", "math", (Message("system", "Mine."), Message("user", "q")))
    source = source_of([own], 0, [{"text": "Be brief."}])
    assert source.draw("math", 0).system is None
    source = source_of([row_named("p")], 0, [{"text": "Be brief.", "weight": 3.0}, {"text": "", "weight": 1.0}])
    drawn = [source.draw("math", order) for order in range(400)]
    assert 0.65 < sum(prompt.system == "Be brief." for prompt in drawn) / 400 < 0.85
    assert all((prompt.prompt.messages[0].role == "system") == (prompt.system is not None) for prompt in drawn)


def test_a_mixture_with_a_capability_without_prompts_is_refused():
    with pytest.raises(ConfigError, match="poetry: no selected prompt has this capability; there are: math"):
        mixture_shares([row_named("p")], {"poetry": 1.0})


def test_band_that_selects_nothing_says_which_rates_there_are():
    found = [Difficulty("a", "math", 8, 8, 0, False), Difficulty("b", "math", 8, 1, 0, False)]
    message = r"got \[0.2, 0.6\].*0.12: 1, 1.00: 1.*\[0.12, 0.6\] 1, \[0.2, 1.0\] 1, \[0.0, 1.0\] 2"
    with pytest.raises(ConfigError, match=message):
        select_band(found, [row_named("a"), row_named("b")], [0.2, 0.6])
