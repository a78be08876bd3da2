"""Filter, profile and evaluation finish their work though their engine, or reward actor, is lost in the middle of it.

Each stage is run twice on one warm engine: undisturbed, and with a real signal to a real process of the engine at the
first sign of progress. Whatever depends on no chance must then be equal: nothing was lost, nothing came twice, and
every answer belongs to its own request.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import ENGINE

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
NUM_ROWS = 192  # three chunks of requests, of which at most two are in flight


class Disturbed(StageContext):
    """Calls `disturb` once, when the stage is told of its first finished requests."""

    disturb: Callable[[], None] | None = None

    def event(self, event: str, **fields: Any) -> None:
        super().event(event, **fields)
        if event == "progress" and fields["done"] < fields["total"] and self.disturb is not None:
            disturb, self.disturb = self.disturb, None
            disturb()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [
        {"id": f"r{i}", "prompt": f"Sum: {i} + {i % 7}", "completion": f"Answer: {i + i % 7}", "answer": str(i)}
        for i in range(NUM_ROWS)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, process: str
) -> tuple[Disturbed, Disturbed]:
    """An undisturbed context, and one in which `process` of the engine gets the signal."""
    from posttrain.sampling.client import Engines

    leased: list[dict[str, int]] = []
    enter = Engines.__enter__

    def remember(self: Engines) -> Engines:
        import ray

        enter(self)
        leased.append(ray.get(self.actors[0].pids.remote()))
        return self

    monkeypatch.setattr(Engines, "__enter__", remember)
    found = []
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        folder.mkdir()
        found.append(Disturbed(name, folder, folder / "events.jsonl", seed=3, warm_engines=True))
    undisturbed, disturbed = found
    disturbed.disturb = lambda: os.kill(leased[-1][process], number)
    return undisturbed, disturbed


def check_events(undisturbed: StageContext, disturbed: StageContext, unit: str) -> None:
    """The engine was replaced where it was disturbed, and each request was finished once."""
    assert not [line for line in read_jsonl(undisturbed.events) if line["event"] == "engine_replaced"]
    lines = list(read_jsonl(disturbed.events))
    (leased,) = (line["names"] for line in lines if line["event"] == "engines")
    assert [line["name"] for line in lines if line["event"] == "engine_replaced"][:1] == leased
    done = [line["done"] for line in lines if line["event"] == "progress" and line["unit"] == unit]
    total = next(line["total"] for line in lines if line["event"] == "progress")
    assert done == sorted(done)  # a count may be told again while groups wait for their scores
    assert done[0] < done[-1] == total


def test_a_filter_survives_the_kill_of_its_engine(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.data.rows import load_rows
    from posttrain.filtering.config import FilterConfig
    from posttrain.filtering.stage import filter_rows

    data = {
        "judge": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"path": str(rows_file)},
        "template": "Rate: {prompt}",
        "engine": ENGINE,
        "resources": {"judge": {"cpus": 0.5}},
    }
    config = validate_config(FilterConfig, data, "test")
    both = contexts(tmp_path, monkeypatch, signal.SIGKILL, "actor")
    expected, found = (filter_rows(load_rows(config.data, kind="supervised"), config, context) for context in both)
    check_events(*both, "rows")
    assert list(found.verdicts) == list(expected.verdicts)
    for name, verdict in found.verdicts.items():
        assert verdict.score == pytest.approx(expected.verdicts[name].score, abs=1e-4)


def test_an_evaluation_survives_the_freeze_of_its_engine_and_the_kill_of_its_reward_actor(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.eval.config import EvalConfig
    from posttrain.eval.stage import evaluate
    from posttrain.scoring.remote.client import RewardClient

    clients: list[RewardClient] = []
    start = RewardClient.start

    async def remember(self: RewardClient) -> None:
        await start(self)
        clients.append(self)

    def freeze_and_kill() -> None:
        freeze()
        os.kill(clients[-1].pids()[0], signal.SIGKILL)

    (tmp_path / "reward.py").write_text("def even(rollout, row):\n    return float(sum(rollout.token_ids) % 2)\n")
    data = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"path": str(rows_file)},
        "reward": {"name": f"{tmp_path / 'reward.py'}:even"},
        "samples": 0,
        "k": 1,
        "sampling": {"max_tokens": 6},
        "engine": ENGINE,
        "resources": {"rollout": {"cpus": 0.5}},
    }
    config = validate_config(EvalConfig, data, "test")
    both = contexts(tmp_path, monkeypatch, signal.SIGSTOP, "actor")
    freeze = both[1].disturb
    assert freeze is not None
    monkeypatch.setattr(RewardClient, "start", remember)
    both[1].disturb = freeze_and_kill
    expected, found = (evaluate(config, context) for context in both)
    check_events(*both, "requests")
    assert [client.num_restarts for client in clients] == [0, 1]
    assert [item.greedy for item in found] == [item.greedy for item in expected]
    assert all(item.greedy is not None and item.greedy.reward is not None for item in found)


def test_a_profile_survives_the_kill_of_its_engines_core(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.data.ends import end_token_ids
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.rl.config import RlConfig
    from posttrain.rl.inputs import draw_plain, read_rows
    from posttrain.rl.prompts.profile import profile_prompts
    from posttrain.sampling.client import Engines

    (tmp_path / "reward.py").write_text("def longer(rollout, row):\n    return float(len(rollout.token_ids) > 3)\n")
    data = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {"path": str(rows_file)},
        "reward": {"name": f"{tmp_path / 'reward.py'}:longer"},
        "profile": {"samples": 2, "band": [0.0, 1.0]},
        "sampling": {"max_tokens": 6},
        "engine": ENGINE,
        "resources": {"rollout": {"cpus": 0.5}},
    }
    config = validate_config(RlConfig, data, "test")
    tokenizer = load_tokenizer(config.model.path)
    prompts = draw_plain(read_rows(config), tokenizer, config)
    both = contexts(tmp_path, monkeypatch, signal.SIGKILL, "core")
    for context in both:
        with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
            stop_ids = tuple(end_token_ids(tokenizer))
            found = profile_prompts(config, context, engines, prompts=prompts, stop_ids=stop_ids)
        assert [item.prompt_id for item in found] == [prompt.row.id for prompt in prompts]
        assert {item.n for item in found} == {2}
        assert all(2 <= item.tokens <= 12 for item in found)
    check_events(*both, "prompts")
