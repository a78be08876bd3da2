"""LoRA on attention and on the weights of all experts: what it trains, and that merging it in changes no number."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from peft import get_peft_model
from test_dpo import make_pairs
from test_model import PADDED, batch, model_pair
from test_sft import make_config, make_context, weights

from posttrain.config.base import validate_config
from posttrain.config.training import LoraConfig
from posttrain.data.pairs import write_pairs
from posttrain.dpo import stage as dpo
from posttrain.dpo.config import DpoConfig
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.model import load_model
from posttrain.parallel.export import without_adapters
from posttrain.parallel.tensors import read_weights, whole_tensors
from posttrain.sft import stage as sft
from posttrain.tune.adapters import adapter_config

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = {"rank": 3, "alpha": 6.0, "target_parameters": EXPERTS}


def adapted(lora: dict[str, Any], implementation: str = "native") -> tuple[Any, Any]:
    """The weights of the hostile model, and the model with adapters that change its logits."""
    theirs, native = model_pair()
    plain = native if implementation == "native" else theirs
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    model = get_peft_model(plain, adapter_config(plain, LoraConfig(**lora)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return start, model


def exported(model: Any) -> dict[str, torch.Tensor]:
    """What an export writes: every weight by the name that it has in a model folder."""
    return {item.name: value.clone() for item, value in read_weights(whole_tensors(model))}


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_merged_is_the_adapted_model(implementation):
    start, model = adapted(LORA, implementation)
    inputs = batch(PADDED)
    with torch.no_grad():
        want = model(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
        plain = without_adapters(model)
        got = plain(**inputs).logits
    real = inputs["attention_mask"].bool()
    after = exported(plain)
    theirs, _ = model_pair()
    theirs.load_state_dict(after)
    with torch.no_grad():
        peer = theirs(**inputs).logits
        with float64_inside():
            exact = copy.deepcopy(theirs).double()(**inputs).logits
    for found in (got, want):  # the adapters' own product is rounded once more, as the merged weight is
        assert_as_exact(found[real], peer[real], exact[real])
    assert (want - without)[real].abs().max() > 0.1
    assert after.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    attention = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    assert changed == {name for name in start if name.endswith((*attention, *EXPERTS))}


def test_gradients_reach_every_adapter_and_nothing_else():
    _, model = adapted(LORA)
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert got == (".lora_" in name) == parameter.requires_grad, name
    experts = [name for name, _ in model.named_parameters() if "experts" in name and ".lora_" in name]
    assert len(experts) == 2 * 2 * 2  # A and B of two weights in two layers


def test_every_expert_has_adapters_of_its_own():
    start, model = adapted({**LORA, "target_modules": []})
    after = exported(without_adapters(model))
    for name in (name for name in start if name.endswith(tuple(EXPERTS))):
        change = after[name] - start[name]
        assert [int(torch.linalg.matrix_rank(expert, tol=1e-4)) for expert in change] == [3] * len(change), name
        assert not torch.allclose(change[0], change[1], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_parameters": ["experts.up_proj"]}, ["lora.target_parameters: got experts.up_proj", *EXPERTS]),
        ({"target_parameters": ["down_proj"]}, ["lora.target_parameters: got down_proj", "experts.down_proj"]),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, ["dropout: got 0.1", "dropout: 0.0"]),
        ({"target_modules": []}, ["target_modules and target_parameters are both empty"]),
        ({"target_modules": ["lm_head"]}, ["target_modules: got lm_head", "leave it out"]),
        ({"target_modules": ["query"]}, ["lora.target_modules: got query", "q_proj, router"]),
    ],
)
def test_what_cannot_be_adapted_is_refused(changes, words):
    _, native = model_pair()
    with pytest.raises(ConfigError) as caught:
        adapter_config(native, validate_config(LoraConfig, changes, "test"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_model_without_such_weights_is_refused():
    _, dense = model_pair(moe_layers=[])
    with pytest.raises(ConfigError, match=r"lora.target_parameters: got .*: this model has no weights of all experts"):
        adapter_config(dense, LoraConfig(target_parameters=EXPERTS))


@pytest.mark.slow
def test_sft_trains_adapters_of_experts_and_exports_them_both_ways(ranks, policy, data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Llama4ForCausalLM

    lora = {**LORA, "target_modules": ["q_proj"], "save": "both"}
    config = make_config(policy, data, lora=lora, optimizer={"learning_rate": 1e-2}, checkpoint_every=2)
    result = sft.run(config, make_context(tmp_path))
    assert result["loss_last"] < result["loss_first"]
    before, after = weights(policy), weights(Path(result["model"]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(("q_proj.weight", *EXPERTS))}
    loaded = AutoModelForCausalLM.from_pretrained(result["model"])
    assert type(loaded) is Llama4ForCausalLM
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours, theirs = load_model(result["model"])(input_ids=ids).logits, loaded(input_ids=ids).logits
        with float64_inside():
            exact = copy.deepcopy(loaded).double()(input_ids=ids).logits
    assert_as_exact(ours, theirs, exact)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(policy)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
        start = load_model(policy)(input_ids=ids).logits
    assert_as_exact(adapted, theirs, exact)
    assert (adapted - start).abs().max() > 0.1


@pytest.mark.slow
def test_a_stopped_sft_with_adapters_of_experts_goes_on_to_the_same_weights(ranks, policy, data, tmp_path):
    config = make_config(policy, data, lora={**LORA, "target_modules": ["q_proj"]}, checkpoint_every=2)
    context = make_context(tmp_path)
    whole = weights(Path(sft.run(config, context)["model"]))
    steps = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    shutil.rmtree(tmp_path / "checkpoints" / f"step_{steps[-1]}")
    again = weights(Path(sft.run(config, context)["model"]))
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [steps[0]]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_dpo_trains_adapters_of_experts_from_the_start_policy(ranks, policy, tmp_path):
    write_pairs(tmp_path / "in.jsonl", make_pairs(16))
    config = validate_config(
        DpoConfig,
        {
            "model": {"path": str(policy), "dtype": "float32"},
            "pairs": {"path": str(tmp_path / "in.jsonl")},
            "max_length": 128,
            "lora": {**LORA, "target_modules": ["q_proj"]},
            "optimizer": {"learning_rate": 1e-2},
            "epochs": 3,
        },
        "test",
    )
    result = dpo.run(config, make_context(tmp_path / "run"))
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the start policy
    assert losses[-1] < losses[0]
    before, after = weights(policy), weights(Path(result["model"]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", *EXPERTS))}
