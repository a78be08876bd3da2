"""Evaluations during training: a real stage with a real engine, and unit tests without an engine."""

import asyncio
import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from rollout_records import drawn, one_turn
from test_rl import make_config, read_rollouts, rows_of, run_stage
from tiny_policy import ENGINE

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.files import append_jsonl, read_jsonl
from posttrain.metrics.intervals import wilson_ci95
from posttrain.records import Message, Outcome, RewardResult, Row, Scored
from posttrain.rl.config import EvaluationConfig, RlConfig
from posttrain.rl.grading.alarm import unscored_of
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import SNAPSHOT
from posttrain.rl.loop.evaluation import (
    FILE,
    EvaluatedPrompt,
    accuracies,
    evaluated_prompt,
    evaluation_request,
    heldout_prompts,
    is_due,
    last_evaluated,
    unscored_prompts,
)
from posttrain.rl.loop.tally import sampled_before
from posttrain.rl.prompts.difficulty import read_estimates
from posttrain.rl.prompts.profile import FILE as PROFILE
from posttrain.rl.records import Group, ScoredGroup
from posttrain.sampling.requests import SampleRequest

HELDOUT = [row | {"id": f"heldout-{row['id']}"} for row in rows_of(["math", "coding"], 12, heldout=True)]


def write_heldout(folder: Path) -> str:
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HELDOUT))
    return str(path)


def log_of(folder: Path):
    """(event, value) of the ledger's log, in order."""
    ledger = Ledger(folder / SNAPSHOT)
    try:
        return [(event, value) for _, _, event, _, value in ledger.log()]
    finally:
        ledger.close()


async def finish_order(actor: Any, prompt_ids: tuple[int, ...]) -> list[bool]:
    """Whether each reply has a low priority, as they end; those with a low one were asked for first."""
    later = [(key, SampleRequest(prompt_ids, 1, 0.7, max_tokens=60, priority=1)) for key in range(120)]
    now = [(key, SampleRequest(prompt_ids, 1, 0.7, max_tokens=60)) for key in range(120, 130)]
    await actor.submit.remote(later + now)
    ended: list[bool] = []
    while len(ended) < 130:
        pieces, _ = await actor.collect.remote(1.0)
        ended += [piece.key < 120 for piece in pieces if piece.finish_reason]
    return ended


def check_by_itself(config: RlConfig, folder: Path) -> tuple[float, list[bool]]:
    """Greedy accuracy of the model that training began with, sampled by itself; and `finish_order`."""
    import ray

    from posttrain.context import StageContext
    from posttrain.data.chat import render_prompt
    from posttrain.data.ends import end_token_ids
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.sampling.client import Engines

    assert config.evaluation is not None
    tokenizer = load_tokenizer(config.model.path)
    rows = [Row(row["id"], row["capability"], (Message("user", row["messages"][0]["content"]),)) for row in HELDOUT]
    prompts = heldout_prompts(config, rows, lambda row, messages: render_prompt(tokenizer, messages))
    stop_ids = tuple(end_token_ids(tokenizer))
    requests = [
        evaluation_request(config.evaluation, prompt, max_tokens=config.sampling.max_tokens, stop_ids=stop_ids)
        for prompt in prompts
    ]
    context = StageContext("check", folder, folder / "check.jsonl", warm_engines=True)
    with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
        sampled, _, _ = ray.get(engines.actors[0].generate_wave.remote(requests, 0))
        replies = [completion.token_ids for (completion,) in sampled]
        order = asyncio.run(finish_order(engines.actors[0], prompts[0].prompt.token_ids))
    right = [sum(token % 2 == 0 for token in ids) / len(ids) >= 0.5 for ids in replies]
    return sum(right) / len(right), order


@pytest.mark.slow
def test_evaluations_run_beside_the_training(ranks, tiny_model, tmp_path):
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"], 120),
        profile={"samples": 1},
        steps=14,
        groups_per_step=2,
        sampling={"max_tokens": 100},
        optimizer={"learning_rate": 1e-2},
        engine=ENGINE,
        evaluation={"data": {"path": write_heldout(tmp_path)}, "every": 6},
    )
    _, metrics = run_stage(config, tmp_path / "rl")
    log, rollouts = log_of(tmp_path / "rl"), read_rollouts(tmp_path / "rl")
    assert [line["step"] for line in metrics] == list(range(14))
    assert audit_stage(tmp_path / "rl").is_clean

    # Evaluations are no groups of the training.
    drawn = {row["prompt_id"] for row in rollouts}
    assert metrics[-1]["prompts_seen"] == 120  # by the profile
    assert all(int(row["group_id"].removeprefix("g")) >= 0 for row in rollouts)
    assert not any(name.startswith("heldout") for name in drawn)
    assert sum(line["tokens_generated"] for line in metrics) <= sum(row["num_tokens"] for row in rollouts)
    assert sum(line["groups_generated"] for line in metrics) <= len(rollouts) / config.group_size

    # The total of tokens begins with the profile's and grows by what is trained on and dropped.
    total = sum(item.tokens for item in read_estimates(tmp_path / "rl" / PROFILE))
    assert total >= 120
    for line in metrics:
        total += line["tokens_generated"]
        assert line["tokens_sampled_total"] == total
    assert sampled_before(tmp_path / "rl", 0) == total
    assert sampled_before(tmp_path / "new", 7) == 7

    # Evaluations, each of one version, while the trainer went on.
    lines = list(read_jsonl(tmp_path / "rl" / FILE))
    assert len(lines) >= 2
    versions = [line["policy_version"] for line in lines]
    assert versions[0] == 0
    assert versions == sorted(set(versions))
    assert all(line["resampled"] == 0 for line in lines)
    assert any(line["step"] > line["policy_version"] for line in lines)
    held = None
    for event, value in log:
        if event == "evaluation":
            held = value[1]
        elif event == "took" and held is not None:
            assert value[1] > held
            held = None
    trained_meanwhile = 0
    for at, (event, _) in enumerate(log):
        if event == "evaluation":
            until = next((place for place in range(at, len(log)) if log[place][0] == "took"), len(log))
            trained_meanwhile += sum(event == "trained" for event, _ in log[at:until])
    assert trained_meanwhile > 2  # groups
    for line in lines:
        assert list(line["capabilities"]) == ["coding", "math", "all"]
        assert [entry["n"] for entry in line["capabilities"].values()] == [12, 12, 24]
        entry = line["capabilities"]["all"]
        assert entry["ci95"] == pytest.approx(list(wilson_ci95(24 * entry["accuracy"], 24)))
        assert line["tokens"] > 24
    accuracy, is_later = check_by_itself(config, tmp_path)
    assert lines[0]["capabilities"]["all"]["accuracy"] == accuracy
    assert is_later[::-1].index(False) > 24  # more than the engine samples at once came after the last that went before


@pytest.mark.slow
@pytest.mark.full  # two engines to start
def test_of_two_workers_one_is_kept_at_its_version_and_the_other_goes_on(ranks, tiny_model, tmp_path):
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"], 60),
        steps=20,
        groups_per_step=2,
        max_staleness=6,
        sampling={"max_tokens": 100},
        engine=ENGINE,
        evaluation={"data": {"path": write_heldout(tmp_path)}, "every": 4},
        resources={"rollout": {"workers": 2, "cpus": 0.3}, "trainer": {"cpus": 0.3}},
    )
    _, metrics = run_stage(config, tmp_path / "rl")
    log = log_of(tmp_path / "rl")
    assert [line["step"] for line in metrics] == list(range(20))
    assert audit_stage(tmp_path / "rl").is_clean
    lines = list(read_jsonl(tmp_path / "rl" / FILE))
    assert len(lines) >= 2
    assert all(line["resampled"] == 0 for line in lines)
    kept, meanwhile = None, []
    for event, value in log:
        if event == "evaluation":
            kept, version = value
            assert version == max([0, *(found for _, found in meanwhile)])  # the newest of the two
        elif event == "took":
            assert value[0] != kept or value[1] > version
            if kept is not None and value[0] == kept:
                kept = None
            meanwhile.append(value)
    names = {name for name, _ in meanwhile}
    assert len(names) == 2
    alone = [value for event, value in log if event == "took"]
    versions = {name: [version for taker, version in alone if taker == name] for name in names}
    assert versions[min(names)] != versions[max(names)]  # one left versions out while it was kept


@pytest.mark.slow
@pytest.mark.full  # test_rl.py kills one in training
def test_an_engine_is_killed_while_it_evaluates(ranks, tiny_model, tmp_path):
    """Strictly on-policy, so that the training waits for each evaluation; one is begun anew, nothing is lost."""
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"]),
        steps=8,
        groups_per_step=2,
        max_staleness=0,
        sampling={"max_tokens": 100},
        engine=ENGINE,
        evaluation={"data": {"path": write_heldout(tmp_path)}, "every": 1, "prompts": 10, "temperature": 0.7},
    )
    killed = []

    def kill():
        path = tmp_path / "rl" / FILE
        while not path.exists() or len(list(read_jsonl(path))) < 3:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "EngineActor" in " ".join(process.cmdline()) or "EngineActor" in process.name():
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)

    threading.Thread(target=kill, daemon=True).start()
    _, metrics = run_stage(config, tmp_path / "rl")
    assert killed
    assert [line["step"] for line in metrics] == list(range(8))
    assert metrics[-1]["engines_replaced"] >= 1
    assert max(line["staleness_max"] for line in metrics) == 0
    assert audit_stage(tmp_path / "rl").is_clean
    lines = list(read_jsonl(tmp_path / "rl" / FILE))
    assert [line["policy_version"] for line in lines] == list(range(8))
    assert all(line["capabilities"]["all"]["n"] == 10 and line["resampled"] == 0 for line in lines)


def test_an_evaluation_that_was_missed_is_made_up_for():
    asked = validate_config(EvaluationConfig, {"data": {"path": "heldout.jsonl"}, "every": 4}, "test")
    assert is_due(asked, 0, None)
    assert [version for version in range(13) if is_due(asked, version, 0)] == list(range(4, 13))
    assert [version for version in range(13) if is_due(asked, version, 6)] == list(range(8, 13))
    assert is_due(asked, 5, None)  # resumed


def test_evaluations_of_undone_steps_are_forgotten(tmp_path):
    assert last_evaluated(tmp_path, 3) is None
    for version in (0, 4, 8):
        append_jsonl(tmp_path / FILE, {"policy_version": version})
    assert last_evaluated(tmp_path, 9) == 8
    assert last_evaluated(tmp_path, 7) == 4
    assert [line["policy_version"] for line in read_jsonl(tmp_path / FILE)] == [0, 4]


def test_accuracy_is_of_prompts_and_leaves_out_what_has_no_score():
    def scored(capability, rewards):
        return EvaluatedPrompt(f"{capability}-{rewards}", capability, tuple(rewards))

    prompts = [scored("b", [1.0, 0.0]), scored("b", [None, 1.0]), scored("a", [0.4, 0.5]), scored("a", [None, None])]
    found = accuracies(prompts, samples=2, threshold=0.5)
    assert list(found) == ["a", "b", "all"]
    assert [(entry["n"], entry["accuracy"], entry["unscored"]) for entry in found.values()] == [
        (1, 0.5, 2), (2, 0.75, 1), (3, pytest.approx(2 / 3), 3),
    ]  # fmt: skip
    assert found["a"]["ci95"] == pytest.approx(list(wilson_ci95(0.5, 1)))
    single = accuracies([scored("a", [None])], samples=2, threshold=0.5)["a"]
    assert (single["n"], single["accuracy"], single["ci95"]) == (0, None, None)


def test_episodes_of_an_evaluation_are_counted_as_eval_counts_them():
    """Of three replies with a score two are episodes; the one without a score has no counts."""

    def reply(index, parts):
        result = None if parts is None else RewardResult(1.0, parts=parts)
        scored = None if index == 2 else Scored(result, Outcome.SCORED if result else Outcome.ERROR)
        rollout = one_turn("r1", "g", index, (1,), (2, 3), "x", (0.0, 0.0), (0, 0), "stop")
        return msgspec.structs.replace(rollout, scored=scored)

    parts = [{"turns": 3, "tool_calls": 2, "malformed_calls": 1}, {"turns": 6, "tool_calls": 5}, {}, None]
    row = Row("r1", "math", (Message("user", "?"),))
    group = Group(-1, drawn(row, row.messages, (1,)), tuple(map(reply, range(4), parts)))
    scored = ScoredGroup(group, (1.0, 1.0, 1.0, None), ("",) * 4, (), ("scored",) * 3 + ("error",))
    prompts = [evaluated_prompt(scored), EvaluatedPrompt("r2", "chat", (1.0,))]
    found = accuracies(prompts, samples=4, threshold=0.5)
    means = {"n": 2, "turns": 4.5, "tool_calls": 3.5, "malformed_calls": 0.5, "tool_failures": 0.0}
    assert [found[name].get("episodes") for name in ("math", "chat", "all")] == [means, None, means]


def test_what_is_kept_of_a_prompt_does_not_grow_with_its_replies():
    """Rewards and why some are missing are kept, so that the last prompt can be told as if all were in memory."""
    kept = []
    for length in (1, 10_000):
        row = Row("r1", "math", (Message("user", "? " * length),))
        ids, logprobs, versions = (3,) * length, (0.0,) * length, (0,) * length
        rollouts = tuple(
            one_turn("r1", "g", index, ids, ids, "x" * length, logprobs, versions, "stop") for index in range(2)
        )
        group = Group(-1, drawn(row, row.messages, (1,) * length), rollouts)
        scored = ScoredGroup(group, (1.0, None), ("", "error: boom"), (), ("scored", "error"))
        kept.append(evaluated_prompt(scored))
        assert unscored_prompts(kept[-1:]).figures() == unscored_of([scored]).figures()
    assert kept[0] == kept[1] == EvaluatedPrompt("r1", "math", (1.0, None), (("error", "error: boom"),))
    assert len(msgspec.json.encode(kept[1])) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deterministic": True, "max_staleness": 0}, "deterministic does not go with evaluation"),
        (
            {
                "weights": {"backend": "nccl"},
                "resources": {"rollout": {"cpus": 0.5, "gpus": 1}, "trainer": {"cpus": 1, "gpus": 1}},
            },
            "evaluation needs weights.backend: shm",
        ),
        ({"evaluation": {"data": {"path": "heldout.jsonl"}, "samples": 4}}, "samples of a prompt would be equal"),
    ],
)
def test_what_does_not_go_with_an_evaluation_is_refused(tmp_path, changes, message):
    settings = {"evaluation": {"data": {"path": "heldout.jsonl"}}, **changes}
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, tmp_path, rows_of(["math"]), **settings)
