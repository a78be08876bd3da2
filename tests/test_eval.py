"""Evaluation: results by hand, what is refused before an engine starts, and the stage on real engines."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_records import one_turn
from tiny_policy import ENGINE

from posttrain.config.base import load_config, validate_config
from posttrain.config.data import DataConfig
from posttrain.context import StageContext
from posttrain.data.strata import sampled_places
from posttrain.errors import ConfigError, DataError, PluginError, StageError
from posttrain.eval.config import EvalConfig
from posttrain.eval.heldout import check_heldout
from posttrain.eval.replies import (
    GREEDY,
    SAMPLE,
    PromptReplies,
    Reply,
    ScoredReplies,
    by_prompt,
    eval_requests,
    flights,
)
from posttrain.eval.results import results
from posttrain.metrics.intervals import wilson_ci95
from posttrain.records import ImagePart, Message, Outcome, RewardResult, Row, Scored, TextPart
from posttrain.resources import bundled_dir

QUERY = "model.layers.0.self_attn.q_proj.weight"


def _row(name: str, capability: str = "math", **fields: Any) -> Row:
    return Row(name, capability, (Message("user", "Sum: 1 + 2"),), answer="3", fields=fields)


def _reply(reward: float | None, text: str = "Answer: 3", truncated: bool = False, num_tokens: int = 4) -> Reply:
    return Reply(text, num_tokens, truncated, reward)


def _config(**values: Any) -> EvalConfig:
    needed = {"model": {"path": "policy"}, "data": {"path": "heldout.jsonl"}, "reward": {"name": "final_answer"}}
    return validate_config(EvalConfig, {**needed, **values}, "test")


def test_results_equal_those_worked_out_by_hand() -> None:
    prompts = [
        PromptReplies(_row("a"), _reply(1.0, "1 + 2 = 3. Answer: 3"), tuple(map(_reply, [1.0, 0.0, 0.0, 0.0]))),
        PromptReplies(_row("b"), _reply(0.4, truncated=True, num_tokens=8), tuple(map(_reply, [0.0] * 4))),
        PromptReplies(_row("c", "chat"), _reply(0.5), ()),
    ]
    found = results(prompts, k=2, threshold=0.5, observe={"worked": r"(?s)\S.*Answer:"}, seed=0)
    assert list(found) == ["chat", "math", "all"]
    math_ = found["math"]
    assert (math_["n"], math_["greedy"], math_["greedy_ci95"]) == (2, 0.5, list(wilson_ci95(1, 2)))
    assert math_["pass@1"] == pytest.approx(0.125)
    assert math_["pass@k"] == pytest.approx((1 - 3 / 6) / 2)  # of the 6 pairs of a's samples, 3 miss the right one
    assert math_["pass@1_ci95"][0] <= 0.125 <= math_["pass@1_ci95"][1]
    assert (math_["k"], math_["pass@k_n"], math_["truncated"], math_["reply_tokens_mean"]) == (2, 2, 1, 6)
    worked = math_["observed"]["worked"]
    assert (worked["share"], worked["n"], worked["of"], worked["accuracy"], worked["accuracy_otherwise"]) == (
        0.5,
        1,
        2,
        1,
        0,
    )
    assert (found["chat"]["greedy"], found["chat"]["pass@k"]) == (1.0, None)
    assert found["all"]["greedy"] == pytest.approx(2 / 3)
    assert found["all"]["reward_mean"] == pytest.approx(1.9 / 3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_prompts_with_pictures_are_counted_by_modality_too() -> None:
    picture = ImagePart("0" * 64)
    shown = [(), (picture,), (picture,), (picture, picture)]
    rows = [
        Row(str(at), "math", (Message("user", (*pictures, TextPart("Which?"))),), "3", {})
        for at, pictures in enumerate(shown)
    ]
    replies = [1.0, 1.0, 0.0, 0.0]
    prompts = [PromptReplies(row, _reply(reward), ()) for row, reward in zip(rows, replies, strict=True)]
    found = results(prompts, k=1, threshold=0.5, observe={}, seed=0)
    assert {name: (entry["n"], entry["greedy"]) for name, entry in found.items()} == {
        "math": (4, 0.5),
        "modality: image": (2, 0.5),
        "modality: multi-image": (1, 0.0),
        "modality: text": (1, 1.0),
        "all": (4, 0.5),
    }
    assert list(found)[-1] == "all"
    assert list(results(prompts[1:3], k=1, threshold=0.5, observe={}, seed=0)) == ["math", "all"]


def test_unscored_replies_are_counted_and_never_wrong() -> None:
    prompts = [
        PromptReplies(_row("a"), _reply(None), tuple(map(_reply, [1.0, None, 1.0]))),
        PromptReplies(_row("b"), _reply(1.0), tuple(map(_reply, [None, None, 1.0]))),
    ]
    found = results(prompts, k=2, threshold=0.5, observe={"any": "."}, seed=0)["all"]
    assert (found["unscored"], found["greedy"], found["greedy_n"], found["pass@1"]) == (4, 1.0, 1, 1.0)
    assert (found["pass@k"], found["pass@k_n"]) == (1.0, 1)  # b has one scored sample, too few for pass@2
    assert found["observed"]["any"]["accuracy"] == 1.0


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=12))
def test_pass_rates_lie_in_their_intervals_and_rise_with_k(rewards: list[list[float]]) -> None:
    prompts = [PromptReplies(_row(str(i)), None, tuple(map(_reply, r))) for i, r in enumerate(rewards)]
    by_k = [results(prompts, k, 0.5, observe={}, seed=1)["all"] for k in (1, 2, 4)]
    assert by_k[0]["pass@k"] == pytest.approx(by_k[0]["pass@1"])
    assert by_k[0]["pass@k"] <= by_k[1]["pass@k"] + 1e-12 <= by_k[2]["pass@k"] + 2e-12
    assert by_k[2]["pass@k"] == pytest.approx(sum(map(any, rewards)) / len(rewards))
    for found in by_k:
        low, high = found["pass@k_ci95"]
        assert 0 <= low <= found["pass@k"] + 1e-9
        assert found["pass@k"] - 1e-9 <= high <= 1


@given(st.lists(st.sampled_from(["math", "coding", "chat"]), min_size=1, max_size=60), st.integers(1, 70))
def test_the_sampled_part_is_spread_over_capabilities(capabilities: list[str], limit: int) -> None:
    rows = [_row(f"r{i}", capability) for i, capability in enumerate(capabilities)]
    chosen = [rows[place] for place in sampled_places(rows, limit)]
    assert len(chosen) == min(limit, len(rows))
    turned = rows[::-1]
    assert [turned[place] for place in sampled_places(turned, limit)][::-1] == chosen
    for name in set(capabilities):
        share = sum(row.capability == name for row in chosen)
        assert abs(share - capabilities.count(name) * len(chosen) / len(rows)) < 1


def test_replies_find_their_prompts(tiny_tokenizer: Any) -> None:
    rows = [_row("a"), _row("b", "chat"), _row("c")]
    config = _config(samples=3, k=2, pass_k_limit=2)
    asked = eval_requests(rows, tiny_tokenizer, config)
    assert [kind for kind, _, _ in asked] == [SAMPLE, SAMPLE, GREEDY, GREEDY, GREEDY]
    assert {request.temperature for kind, _, request in asked if kind == GREEDY} == {0.0}
    assert all(tiny_tokenizer.eos_token_id in request.stop_token_ids for _, _, request in asked)
    found = ScoredReplies(len(asked), None)
    for flight, (kind, row, request) in reversed(list(zip(flights(asked), asked, strict=True))):
        for index in range(request.n):
            text = f"{kind} {row.id} {index}"
            flight.finished[index] = one_turn(row.id, row.id, index, (1,), (2, 3), text, (0, 0), (), "length")
        assert flight.prompt.row == row
        scores = [Scored(RewardResult(1.0)) if i else Scored(None, Outcome.TIMEOUT) for i in range(request.n)]
        found.take(flight, scores)
    prompts = by_prompt(rows, found.close(), config)
    for item, row in zip(prompts, rows, strict=True):
        assert item.row == row
        assert item.greedy is not None
        assert item.greedy.text == f"greedy {item.row.id} 0"
        assert [reply.text for reply in item.samples] == [f"sample {item.row.id} {i}" for i in range(len(item.samples))]
        assert item.greedy.truncated
    assert sorted(len(item.samples) for item in prompts) == [0, 3, 3]
    assert prompts[0].greedy.note == "unscored: timeout"


def test_a_prompt_that_leaves_no_room_is_refused(tiny_tokenizer: Any) -> None:
    config = _config(engine={"max_model_len": 40}, sampling={"max_tokens": 30})
    with pytest.raises(DataError, match=r"row a: its prompt has \d+ tokens, .*max_tokens 30 .*max_model_len 40"):
        eval_requests([_row("a")], tiny_tokenizer, config)


def _training_set(tmp_path: Path, *records: dict[str, Any]) -> DataConfig:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(path))


def test_a_heldout_problem_in_a_training_set_is_an_error(tmp_path: Path) -> None:
    rows = [_row("h1", key="sum 1 2"), _row("h2", key=["sum", 3, 4])]
    check_heldout(rows, [_training_set(tmp_path, {"key": "sum 9 9"}, {"key": ["sum", 4, 4]})], "key")
    leaked = _training_set(tmp_path, {"key": "sum 9 9"}, {"key": ["sum", 3, 4], "prompt": "Sum: 4 + 3"})
    with pytest.raises(DataError, match=r"held-out row h2 .*train\.jsonl: row 2, which is trained on"):
        check_heldout(rows, [leaked], "key")
    check_heldout(rows, [leaked.model_copy(update={"limit": 1})], "key")
    with pytest.raises(DataError, match=r"train\.jsonl: row 1: no 'key'"):
        check_heldout(rows, [_training_set(tmp_path, {"prompt": "Sum: 1 + 2"})], "key")
    with pytest.raises(DataError, match="held-out row h3: no 'key'"):
        check_heldout([_row("h3")], [leaked], "key")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"greedy": False, "samples": 0}, "nothing to measure"),
        ({"samples": 4}, "k is 8 and samples is 4"),
        ({"sampling": {"temperature": 0.0}}, "temperature is 0"),
        ({"sampling": {"max_tokens": 4096}}, r"below engine\.max_model_len \(4096\)"),
        ({"exclude": [{"path": "train.jsonl"}]}, "belong together"),
        ({"key_field": "key"}, "belong together"),
        ({"observe": {"worked": "("}}, "worked: .* is not a regular expression"),
        ({"correct_treshold": 0.5}, "did you mean 'correct_threshold'"),
    ],
)
def test_a_wrong_config_is_refused_with_the_rule(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        _config(**values)


@pytest.mark.parametrize("name", ["eval", "quickstart/eval"])
def test_bundled_configs_are_valid(name: str) -> None:
    load_config(EvalConfig, bundled_dir("configs") / f"{name}.yaml")


@pytest.mark.parametrize(
    ("reply", "worked"),
    [
        ("3 + 4 = 7; Answer: 7", True),
        ("3 + 4 = 7\nAnswer: 7", True),
        ("Answer: 7", False),
        (" Answer: 7 Answer: 7", False),
        ("3 + 4 = 7", False),
    ],
)
def test_the_quick_starts_pattern_finds_replies_that_show_their_work(reply: str, worked: bool) -> None:
    config = load_config(EvalConfig, bundled_dir("configs") / "quickstart/eval.yaml")
    assert (re.search(config.observe["worked"], reply) is not None) == worked


# --- on real engines ---

REWARD = '''
def letters(rollout, row):
    """The share of a quarter of the ids that are even; one capability cannot be scored."""
    if row.capability == "broken":
        raise RuntimeError("no grader for this")
    return float(sum(rollout.token_ids) % 4 == 0)
'''


def _stage(
    tmp_path: Path, tiny_model: Path, capabilities: tuple[str, ...], **values: Any
) -> tuple[EvalConfig, StageContext]:
    rows = [
        {
            "id": f"h{j}-{i}",
            "capability": name,
            "prompt": f"Sum: {i} + {i + j}",
            "answer": str(2 * i + j),
            "key": f"{i} {j}",
        }
        for j, name in enumerate(capabilities)
        for i in range(12)
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    config = _config(
        model={"path": str(tiny_model), "dtype": "float32"},
        data={"path": str(tmp_path / "heldout.jsonl")},
        reward={"name": f"{tmp_path / 'reward.py'}:letters"},
        sampling={"max_tokens": 12},
        engine=ENGINE,
        resources={"rollout": {"cpus": 0.5}},
        **values,
    )
    return config, StageContext("eval", tmp_path, tmp_path / "events.jsonl", seed=3, warm_engines=True)


@pytest.mark.slow
def test_stage_on_a_real_engine(tmp_path: Path, tiny_model: Path, ray_session: None) -> None:
    from posttrain.eval.stage import run

    config, context = _stage(
        tmp_path, tiny_model, ("math", "chat", "broken"), samples=6, k=4, pass_k_limit=9, observe={"a": "a"}
    )
    outputs = run(config, context)
    found = json.loads(Path(outputs["results"]).read_text())
    lines = [json.loads(line) for line in Path(outputs["samples"]).read_text().splitlines()]

    assert list(found) == ["broken", "chat", "math", "all"]
    assert found["all"] == outputs["stats"]
    assert found["broken"]["greedy"] is None
    assert found["broken"]["unscored"] == 12 + 3 * 6
    assert found["all"]["unscored"] == found["broken"]["unscored"]
    assert [line["id"] for line in lines] == [f"h{j}-{i}" for j in range(3) for i in range(12)]
    for name in ("math", "chat"):
        part = [line for line in lines if line["capability"] == name]
        assert found[name]["greedy"] == pytest.approx(sum(line["reward"] for line in part) / 12)
        drawn = [line["sample_rewards"] for line in part if line["sample_rewards"]]
        assert [len(rewards) for rewards in drawn] == [6, 6, 6]
        assert found[name]["pass@1"] == pytest.approx(sum(map(sum, drawn)) / 18)
        expected = [1 - math.comb(6 - int(sum(r)), 4) / math.comb(6, 4) for r in drawn]
        assert found[name]["pass@k"] == pytest.approx(sum(expected) / 3)
        assert found[name]["observed"]["a"]["n"] == sum("a" in line["reply"] for line in part)
    events = [json.loads(line) for line in context.events.read_text().splitlines()]
    (alarm,) = [event for event in events if event["event"] == "alarm"]
    assert any("no grader for this" in reason for reason, _ in alarm["reasons"])
    assert alarm["text"].startswith("evaluation: 12 of 36 prompts could not be scored (RuntimeError 12), e.g. row h2-")
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["values"]["unscored"] > 0
    assert (progress[-1]["done"], progress[-1]["total"]) == (36 + 9, 36 + 9)


@pytest.mark.slow
def test_greedy_replies_of_adapters_are_those_of_the_model_that_they_make(
    tmp_path: Path, tiny_model: Path, ray_session: None
) -> None:
    import torch
    from test_adapters import adapted

    from posttrain.config.training import LoraConfig
    from posttrain.data.chat import render_prompt
    from posttrain.data.ends import end_token_ids
    from posttrain.eval.stage import evaluate
    from posttrain.model.load import load_model
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.parallel.adapters import export_adapter
    from posttrain.pipeline.adapters import with_whole_models
    from posttrain.pipeline.kinds import KINDS

    tokenizer = load_tokenizer(tiny_model)
    trained = adapted(tiny_model, LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"]))
    folder = export_adapter(trained, tiny_model, tokenizer=tokenizer, path=tmp_path / "adapter")
    given, context = _stage(tmp_path, folder, ("math",), samples=0)
    config = with_whole_models(given, KINDS["eval"], context)
    prompts = evaluate(config, context)
    model = load_model(config.model.path)
    assert not torch.equal(model.state_dict()[QUERY], load_model(tiny_model).state_dict()[QUERY])
    eos = model.generation_config.eos_token_id  # an engine stops at these too
    ends = {*end_token_ids(tokenizer), *(eos if isinstance(eos, list) else [eos])}
    for item in prompts:
        ids = render_prompt(tokenizer, item.row.messages)
        start = len(ids)
        while len(ids) - start < 12 and (len(ids) == start or ids[-1] not in ends):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert item.greedy is not None
        assert item.greedy.text == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert item.greedy.truncated == (ids[-1] not in ends)
        assert item.samples == ()


@pytest.mark.slow
def test_a_reward_that_scores_nothing_fails_the_stage(tmp_path: Path, tiny_model: Path, ray_session: None) -> None:
    from posttrain.eval.stage import run

    config, context = _stage(tmp_path, tiny_model, ("broken",), samples=0)
    with pytest.raises(StageError, match=r"none of the 12 replies could be scored.*no grader for this"):
        run(config, context)
    assert not (tmp_path / "results.json").exists()


def test_a_reward_that_is_not_there_is_found_before_an_engine_starts(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.eval.stage import run

    config, context = _stage(tmp_path, tiny_model, ("math",))
    reward = config.reward.model_copy(update={"name": f"{tmp_path}/reward.py:leters"})
    with pytest.raises(PluginError, match="letters"):
        run(config.model_copy(update={"reward": reward}), context)
    assert not context.events.exists()
