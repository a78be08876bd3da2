"""The judge of an RL stage: what is checked before it starts, and a real one, on engines of its own, that is killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rollout_records import one_turn
from tiny_policy import ENGINE

from posttrain.config.base import dump_yaml, validate_config
from posttrain.context import StageContext
from posttrain.errors import ConfigError, UserError
from posttrain.files import read_jsonl
from posttrain.judging.verdicts import verdict_of
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS
from posttrain.records import Message, RewardResult, Row
from posttrain.rewards.judged import judged
from posttrain.rl.config import RlConfig

TEMPLATE = "Rate: {prompt} {response}"
LABELS = ["easy", "medium", "hard"]


def make_config(folder: Path, model: Path, **changes):
    rows = [
        {"id": f"r{index}", "answer": str(2 * index), "messages": [{"role": "user", "content": f"{index} + {index}"}]}
        for index in range(12)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "reward": {"name": "judged"},
        "judge": {
            "model": {"path": str(model), "dtype": "float32"},
            "template": TEMPLATE,
            "labels": LABELS,
            "engine": ENGINE,
        },
        "profile": {"samples": 2, "band": [0.0, 1.0]},
        "steps": 6,
        "groups_per_step": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 24},
        "optimizer": {"learning_rate": 1e-4},
        "engine": ENGINE,
        "resources": {"rollout": {"cpus": 0.5}, "judge": {"cpus": 0.5}, "trainer": {"cpus": 0.5}},
        **changes,
    }
    return validate_config(RlConfig, {key: value for key, value in data.items() if value is not None}, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resources": {}}, "judge and resources.judge go together"),
        ({"judge": None}, "judge and resources.judge go together"),
        ({"deterministic": True, "max_staleness": 0}, "deterministic does not go with judge"),
        ({"judge": {"model": {"path": "m"}, "template": "{prompt} {reply}"}}, "{reply} is not a placeholder"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, tmp_path, **changes)


def test_a_reward_that_needs_a_judge_is_refused_without_one(tmp_path, tiny_model):
    """Its verdict is no field of the rows: it is there where the stage has a judge."""
    assert input_problems(make_config(tmp_path, tiny_model), KINDS["rl"]) == []
    bare = make_config(tmp_path, tiny_model, judge=None, resources={})
    found = input_problems(bare, KINDS["rl"])
    assert found
    assert all("no 'judge', which reward 'judged' needs" in line for line in found)


def test_labels_that_begin_alike_are_refused_before_an_engine_starts(tmp_path, tiny_model):
    from posttrain.rl.stage import run

    config = make_config(tmp_path, tiny_model)
    asked = config.judge.model_copy(update={"labels": ["wrong", "wrongish"]})
    context = StageContext("rl", tmp_path / "rl", tmp_path / "events.jsonl")
    (tmp_path / "rl").mkdir()
    with pytest.raises(UserError, match="both begin with the token"):
        run(config.model_copy(update={"judge": asked}), context)


def test_the_reward_is_the_expected_place_among_the_labels():
    verdict = verdict_of(["wrong", "right"], [-1.0, -0.5]).to_json("judge")
    rollout = one_turn("p", "g", 0, (1,), (2,), "yes", (-1.0,), (), "stop")
    row = Row("p", "math", (Message("user", "?"),))
    scored = judged(rollout, Row("p", "math", row.messages, fields={"judge": verdict}))
    assert isinstance(scored, RewardResult)
    assert scored.value == pytest.approx(torch.tensor([-1.0, -0.5]).softmax(0)[1].item(), abs=1e-5)
    assert scored.reason == "right"
    with pytest.raises(ValueError, match="no judge has rated the reply"):
        judged(rollout, row)


@pytest.mark.slow
def test_rewards_are_what_the_judge_says_though_it_is_killed(ranks, tiny_model, tmp_path, monkeypatch):
    """Every reward is the judge's, recomputed with another implementation; nothing is scored or dropped without it."""
    import pyarrow.parquet as pq
    import ray

    from posttrain.judging import engines as judging_engines
    from posttrain.judging.backend import prepare_judge
    from posttrain.model.load import load_model
    from posttrain.rl import stage
    from posttrain.sampling.client import Engines

    config = make_config(tmp_path, tiny_model)
    folder = tmp_path / "rl"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config))
    engines, killed = [], []

    class Seen(judging_engines.EngineJudge):
        def __init__(self, leased: Engines, *given, **named):
            engines.append(leased)
            super().__init__(leased, *given, **named)

    def kill() -> None:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or sum(1 for _ in read_jsonl(metrics)) < 2:
            time.sleep(0.05)
        pid = ray.get(engines[0].actors[0].pids.remote())["actor"]
        os.kill(pid, signal.SIGKILL)
        killed.append(engines[0].names[0])

    monkeypatch.setattr(judging_engines, "EngineJudge", Seen)
    threading.Thread(target=kill, daemon=True).start()
    outputs = stage.run(config, StageContext("rl", folder, folder / "events.jsonl", seed=3))
    assert outputs["steps"] == 6
    replaced = [line["name"] for line in read_jsonl(folder / "events.jsonl") if line["event"] == "engine_replaced"]
    assert len(killed) == 1
    assert killed[0] in replaced  # a busy machine may let a healthy one miss its deadline as well
    lines = list(read_jsonl(folder / "metrics.jsonl"))
    assert all(f"idle/{killed[0]}" in line for line in lines)
    rollouts = [
        row for path in sorted((folder / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert len(rollouts) >= 6 * 16
    assert all(row["reward"] is not None for row in rollouts)
    assert config.judge is not None
    prompts = prepare_judge(config.judge).prompts
    policy = load_model(str(tiny_model))
    for row in [*rollouts[:20], *rollouts[-20:]]:
        messages = tuple(Message(**item) for item in json.loads(row["prompt"]))
        question = prompts.render(Row("r", "math", (*messages, Message("assistant", row["reply"]))))
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([question.token_ids])).logits[0, -1]
        verdict = verdict_of(LABELS, logits[list(prompts.choice_ids)].log_softmax(-1).tolist())
        assert row["reward"] == pytest.approx(verdict.score, abs=1e-4)
        assert row["reason"] == verdict.tag
