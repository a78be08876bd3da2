"""The `router` section in SFT and DPO: losses on routers in TRL's loss, the bias over steps, figures in the metrics."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import test_dpo
import test_sft
import torch
from tiny_policy import save_tiny_policy, write_sums
from warm_ranks import WarmRanks

from posttrain.context import StageContext
from posttrain.data.pairs import write_pairs
from posttrain.dpo import stage as dpo
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.model import load_model
from posttrain.sft import stage as sft
from posttrain.tune import routers
from posttrain.tune.run import Work, train_and_export

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder

LOSSES = {"balance_loss": 0.5, "z_loss": 0.25}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sft.jsonl", 52)  # packed into rows that divide among two ranks


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, test_dpo.make_pairs(16))
    return path


def model_of(policy: Path, **router) -> dict:
    return {"path": str(policy), "dtype": "float32", "router": router}


def steps_of(context: StageContext) -> list[dict]:
    return [line for line in read_jsonl(context.dir / "metrics.jsonl") if "learning_rate" in line]


def router_losses(function: Callable[..., Any], *arguments: Any) -> list[tuple[int, float]]:
    """In a rank: tokens, and weighted loss on routers, of each training forward, from what the model recorded."""
    from posttrain.model.native import NativeLlama4Model
    from posttrain.model.router_stats import load_balance_loss, z_loss

    seen: list[tuple[int, float]] = []
    original = NativeLlama4Model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.training and output.last_hidden_state.requires_grad:
            with torch.no_grad():
                routings, keep_T = self.last_routings
                loss = 0.5 * load_balance_loss(routings, keep_T, self.step_load_LE) + 0.25 * z_loss(routings, keep_T)
                seen.append((len(routings[0].logits_TE) if keep_T is None else int(keep_T.sum()), float(loss)))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeLlama4Model, "forward", forward)
        function(*arguments)
    return seen


def train_and_look(ranks: WarmRanks, stage: Any, config: Any, context: StageContext) -> list[tuple[int, float]]:
    """Train with a stage, and return `router_losses`."""
    prepared = stage.prepare(config, context) if stage is sft else stage.prepare(config, context.seed, context)
    data = prepared.examples if stage is sft else prepared.ids
    work = Work(stage.make_tuning, prepared.tokenizer, data)
    return ranks.call(router_losses, train_and_export, config, context, work)


def mean_loss(seen: list[tuple[int, float]]) -> float:
    """Over the tokens of several forwards."""
    return sum(tokens * loss for tokens, loss in seen) / sum(tokens for tokens, _ in seen)


@pytest.mark.slow
def test_sft_adds_the_mean_over_tokens_of_its_forwards_losses_to_the_loss(ranks, policy, data, tmp_path):
    plain, both = (test_sft.make_context(tmp_path / name) for name in ("plain", "both"))
    settings = {"gradient_accumulation": 3, "gradient_checkpointing": "selective"}
    sft.run(test_sft.make_config(policy, data, **settings), plain)
    config = test_sft.make_config(policy, data, **settings, model=model_of(policy, **LOSSES))
    seen = train_and_look(ranks, sft, config, both)
    without, with_losses = steps_of(plain)[0], steps_of(both)[0]
    assert with_losses["loss"] == pytest.approx(without["loss"] + mean_loss(seen[:3]), rel=1e-5)
    assert with_losses["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)
    trained = [load_model(context.dir / "model") for context in (plain, both)]
    names = [name for name, _ in trained[0].named_parameters() if name.endswith("router.weight")]
    assert len(names) == 2
    assert all(not torch.equal(*(model.get_parameter(name) for model in trained)) for name in names)
    assert trained[1].config.router_aux_loss_coef == 0  # a training's own, not the folder's


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dpo_adds_them_too(ranks, policy, pairs, tmp_path, accumulation):
    context = test_dpo.make_context(tmp_path)
    settings = {"pairs": {"path": str(pairs)}, "batch_size": 4, "gradient_accumulation": accumulation}
    config = test_dpo.make_config(policy, **settings, model=model_of(policy, **LOSSES))
    seen = train_and_look(ranks, dpo, config, context)
    # At the start policy the loss of every pair is log 2.
    assert steps_of(context)[0]["loss"] == pytest.approx(0.693147 + mean_loss(seen[:accumulation]), rel=1e-4)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.slow
def test_figures_of_each_step(ranks, policy, data, pairs, tmp_path, lora):
    for context, run in (
        (test_sft.make_context(tmp_path / "sft"), lambda c: sft.run(test_sft.make_config(policy, data, lora=lora), c)),
        (
            test_dpo.make_context(tmp_path / "dpo"),
            lambda c: dpo.run(test_dpo.make_config(policy, pairs={"path": str(pairs)}, lora=lora), c),
        ),
    ):
        run(context)
        for line in steps_of(context):
            assert 0 < line["router_entropy"] < 1.3863  # log 4
            assert 1 <= line["expert_load_max"] <= 4
            assert 0 <= line["dead_experts"] <= 6


@pytest.mark.slow
def test_an_expert_that_is_never_chosen_is_dead(ranks, policy, data, tmp_path):
    folder = tmp_path / "skewed"
    shutil.copytree(policy, folder)
    model = load_model(folder)
    from posttrain.model import load_tokenizer, save_model

    with torch.no_grad():
        for moe in model.model.moe_layers:
            moe.router.weight[1:] = moe.router.weight[0]  # equal logits: the same expert is always taken
    save_model(model, load_tokenizer(policy), folder)
    context = test_sft.make_context(tmp_path / "run")
    sft.run(test_sft.make_config(folder, data), context)
    first = steps_of(context)[0]
    assert (first["dead_experts"], first["expert_load_max"]) == (6, 4)
    assert first["router_entropy"] == pytest.approx(1.386294, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_training_has_the_bias_it_would_have_had(ranks, policy, data, tmp_path):
    context = test_sft.make_context(tmp_path)
    settings = {"epochs": 3, "checkpoint_every": 4, "model": model_of(policy, bias_rate=0.2)}
    sft.run(test_sft.make_config(policy, data, **settings), context)
    whole = dict(load_model(context.dir / "model").state_dict())
    lines = steps_of(context)
    kept = sorted((context.dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    one = json.loads((kept[-1] / routers.STATE).read_text())
    shutil.rmtree(kept[-1])
    assert (kept[0] / routers.STATE).exists()
    shutil.rmtree(context.dir / "model")
    sft.run(test_sft.make_config(policy, data, **settings), context)
    assert [e["event"] for e in read_jsonl(context.events)].count("resumed") == 1
    resumed = load_model(context.dir / "model").state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    timeless = [{name: value for name, value in line.items() if name != "t"} for line in steps_of(context)]
    assert timeless == [{name: value for name, value in line.items() if name != "t"} for line in lines]
    assert max(abs(bias) for layer in one["bias"] for bias in layer) > 0.3
    assert json.loads((kept[-1] / routers.STATE).read_text()) == one
    assert not any("bias" in name for name in whole)
    without = test_sft.make_context(tmp_path / "without")
    sft.run(test_sft.make_config(policy, data, epochs=3, checkpoint_every=4), without)
    assert steps_of(without)[0]["loss"] == lines[0]["loss"]  # no bias before the first step
    assert steps_of(without)[-1]["loss"] != lines[-1]["loss"]


@pytest.mark.slow
def test_two_ranks_do_as_one(ranks, policy, data, tmp_path):
    model = model_of(policy, **LOSSES, bias_rate=0.05)
    alone, two = (test_sft.make_context(tmp_path / name) for name in ("alone", "two"))
    sft.run(test_sft.make_config(policy, data, gradient_accumulation=2, model=model), alone)
    sft.run(test_sft.make_config(policy, data, model=model, parallel={"processes": 2, "expert": 2, "zero": 2}), two)
    ours, theirs = steps_of(two), steps_of(alone)
    assert len(ours) == len(theirs) > 2
    for name in ("loss", "router_entropy", "expert_load_max", "dead_experts"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3), name


def test_routers_that_are_not_there_are_refused(policy, data, tmp_path):
    router = {"balance_loss": 0.1, "bias_rate": 0.01}
    changed = {"path": str(policy), "dtype": "float32", "implementation": "transformers", "router": router}
    config = test_sft.make_config(policy, data, model=changed, packing=False, batch_tokens=None, batch_size=4)
    with pytest.raises(ConfigError) as caught:
        sft.run(config, test_sft.make_context(tmp_path))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["router.balance_loss", "router.bias_rate"]
    assert "got 0.1 for a llama4_text model in the transformers implementation" in lines[0]
    dense = save_tiny_policy(tmp_path / "dense", moe_layers=[])
    with pytest.raises(ConfigError, match=r"router.z_loss: got 0.2 for this model; it has no mixture-of-experts"):
        sft.run(
            test_sft.make_config(dense, data, model=model_of(dense, z_loss=0.2)), test_sft.make_context(tmp_path / "d")
        )
