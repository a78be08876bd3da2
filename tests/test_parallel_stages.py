"""SFT and DPO over several ranks, each with a real DeepSpeed engine, against the same training in one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_sft import make_config, make_context
from tiny_policy import write_sums

from posttrain.config.base import validate_config
from posttrain.dpo import stage as dpo
from posttrain.dpo.config import DpoConfig
from posttrain.errors import ConfigError
from posttrain.metrics.jsonl import read_jsonl
from posttrain.model import load_model
from posttrain.sft import stage as sft

pytestmark = pytest.mark.slow
# The session is shared with tests that leave a warm engine on one of the two CPUs.
RESOURCES = {"trainer": {"cpus": 0.25}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sft.jsonl", 52)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder / "model").named_parameters())


def largest_difference(one: Path, other: Path) -> float:
    got, want = weights(one), weights(other)
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).detach().abs().max()) for name in want)


def test_sft_on_two_ranks_is_the_training_of_one_process(ray_session, policy, data, tmp_path):
    alone = make_context(tmp_path / "alone")
    two = make_context(tmp_path / "two")
    sft.run(make_config(policy, data, gradient_accumulation=2), alone)
    report = sft.run(
        make_config(policy, data, parallel={"processes": 2, "expert": 2, "zero": 2}, resources=RESOURCES), two
    )
    assert report["engine"] == "DeepSpeedEngine"
    assert (report["processes"], report["expert"]) == (2, 2)
    ours, theirs = (list(read_jsonl(context.dir / "metrics.jsonl")) for context in (two, alone))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert largest_difference(two.dir, alone.dir) < 1e-4
    assert json.loads((two.dir / "model" / "config.json").read_text())["architectures"] == ["Llama4ForCausalLM"]


def test_a_stopped_sft_goes_on_in_another_layout(ray_session, policy, data, tmp_path):
    context = make_context(tmp_path / "ranks")
    config = {
        "checkpoint_every": 2,
        "parallel": {"processes": 2, "expert": 2, "zero": 2},
        "resources": RESOURCES,
    }
    sft.run(make_config(policy, data, **config), context)
    whole = {name: weight.detach().clone() for name, weight in weights(context.dir).items()}
    for layout, changes in (("same", {}), ("other", {"parallel": {"processes": 1}, "gradient_accumulation": 2})):
        for path in (context.dir / "checkpoints").glob("step_*"):
            if path.name != "step_2":
                shutil.rmtree(path)
        shutil.rmtree(context.dir / "model")
        sft.run(make_config(policy, data, **{**config, **changes}), context)
        resumed = [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"]
        assert resumed[-1] == 2, layout
        gap = max(float((weight.detach() - whole[name]).abs().max()) for name, weight in weights(context.dir).items())
        assert gap == 0 if layout == "same" else gap < 1e-5, (layout, gap)
    lines = list(read_jsonl(context.dir / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 5))


def test_dpo_on_two_ranks_learns_the_same_preferences(ray_session, policy, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for a in range(2, 10):
            prompt = [{"role": "user", "content": f"Sum: {a} + 3"}]
            row = {"id": f"p{a}", "prompt": prompt, "chosen": f"Answer: {a + 3}", "rejected": f"Answer: {a + 4}"}
            file.write(json.dumps(row) + "\n")
    base = {"model": {"path": str(policy), "dtype": "float32"}, "pairs": {"path": str(pairs)}, "max_length": 128,
            "optimizer": {"learning_rate": 1e-4}, "resources": RESOURCES}  # fmt: skip
    runs = {
        "alone": {"batch_size": 4},
        "two": {"batch_size": 2, "parallel": {"processes": 2, "expert": 2, "zero": 1}},
    }
    reports, losses = {}, {}
    for name, changes in runs.items():
        context = make_context(tmp_path / name)
        reports[name] = dpo.run(validate_config(DpoConfig, {**base, **changes}, "test"), context)
        losses[name] = [line["loss"] for line in read_jsonl(context.dir / "metrics.jsonl") if "loss" in line]
    assert reports["two"]["engine"] == "DeepSpeedEngine"
    assert losses["two"] == pytest.approx(losses["alone"], rel=1e-4)
    assert largest_difference(tmp_path / "two", tmp_path / "alone") < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"processes": 2, "expert": 4}}, ["does not divide processes 2"]),
        ({"parallel": {"processes": 3, "expert": 3}}, ["got 3", "model's 4 experts"]),
        ({"parallel": {"processes": 2, "expert": 2}, "lora": {"rank": 4}}, ["lora", "parallel.expert: 1"]),
        ({"parallel": {"processes": 2, "expert": 2}, "implementation": "transformers"}, ["implementation: native"]),
        ({"parallel": {"zero": 0, "offload": "optimizer"}}, ["offload"]),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_any_rank_starts(policy, data, tmp_path, changes, words):
    model = {"path": str(policy), "dtype": "float32", "implementation": changes.pop("implementation", "native")}
    with pytest.raises(ConfigError) as caught:
        sft.run(make_config(policy, data, model=model, **changes), make_context(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
