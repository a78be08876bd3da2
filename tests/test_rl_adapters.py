"""LoRA in RL: weights with adapters are what is sent and compared, and a training with them is the written-out one."""

import copy
import sys
from functools import partial
from typing import Any

import pytest
import ray.cloudpickle
import torch
from test_adapters import adapted
from test_rl import make_config as stage_config
from test_rl import rows_of, run_stage
from test_rl_trainer import EXPERTS, LORA, TEMPERATURE, batch, layout, make_config
from test_sft import weights

from posttrain.config.base import validate_config
from posttrain.config.training import LoraConfig
from posttrain.errors import ConfigError, StageError
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.adapter_start import started_lora
from posttrain.parallel.adapters import export_adapter, merge_adapter
from posttrain.parallel.export import without_adapters
from posttrain.parallel.tensors import read_weights, sent_tensors, trained_tensors, whole_tensors
from posttrain.rl.config import RlConfig
from posttrain.rl.stage import run
from posttrain.rl.training.adapters import AdapterProbe, StartAdapters, adapters_off
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.policy import load_token_policy, sample_logprobs

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the trainer's process does not find the tests' folder

ALL = LoraConfig(**LORA, target_parameters=EXPERTS)


def values(items: Any) -> dict[str, torch.Tensor]:
    return {item.name: value.detach().clone() for item, value in read_weights(items)}


def test_what_is_sent_is_the_merged_model_bit_for_bit(policy):
    model = adapted(policy, ALL)
    sent = values(whole_tensors(model))
    merged = values(whole_tensors(without_adapters(copy.deepcopy(model))))
    start = load_model(policy).state_dict()
    assert sent.keys() == merged.keys() == start.keys()
    assert all(torch.equal(sent[name], merged[name]) for name in sent)
    changed = {name for name in sent if not torch.equal(sent[name], start[name])}
    assert changed == {name for name in sent if name.endswith(("q_proj.weight", "o_proj.weight", *EXPERTS))}
    assert all(".lora_" in item.name for item in trained_tensors(model))


def test_only_blocks_with_adapters_are_sent(policy):
    sent = {item.name for item in sent_tensors(adapted(policy, LoraConfig(**{**LORA, "target_modules": ["q_proj"]})))}
    names = load_model(policy).state_dict().keys()
    assert sent == {name for name in names if ".self_attn." in name}  # with what an engine fuses with q_proj
    sent = {
        item.name for item in sent_tensors(adapted(policy, LoraConfig(target_modules=[], target_parameters=EXPERTS)))
    }
    assert sent == {name for name in names if ".experts." in name or name.endswith("router.weight")}
    assert {item.name for item in sent_tensors(load_model(policy))} == names


def test_dora_must_be_merged_before_it_is_sent(policy):
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    model = get_peft_model(load_model(policy), PeftLora(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="must be merged first"):
        whole_tensors(model)


def test_the_policy_without_its_adapters_is_the_start_and_a_probe_leaves_no_trace(policy):
    config = make_config(str(policy), lora={**LORA, "target_parameters": EXPERTS})
    plain = load_token_policy(config.model, TEMPERATURE).eval()
    torch.manual_seed(0)
    with_them = load_token_policy(config.model, TEMPERATURE, lora=config.lora).eval()
    samples = batch(0)

    def logprobs(token_policy: Any) -> torch.Tensor:
        return torch.tensor([x for row in sample_logprobs(token_policy, samples, 64, device="cpu") for x in row])

    start = logprobs(plain)
    assert torch.equal(logprobs(with_them), start)  # new adapters change nothing
    before = values(trained_tensors(with_them))
    probe = AdapterProbe(with_them)
    effects = []
    for size in (0.1, 0.4):
        probe.set(size)
        weights, base = values(whole_tensors(with_them)), load_model(policy).state_dict()
        for name in (name for name in base if name.endswith(("q_proj.weight", *EXPERTS))):
            share = (weights[name] - base[name]).norm() / base[name].norm()
            assert float(share) == pytest.approx(size, rel=1e-3)
        effects.append(float((logprobs(with_them) - start).abs().mean()))
        with adapters_off(with_them):
            assert torch.equal(logprobs(with_them), start)
    assert 4e-3 < effects[0] < effects[1]  # 4 times the tolerance: it is seen whether an engine has them
    probe.restore()
    after = values(trained_tensors(with_them))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_continued_adapters_are_trained_and_the_start_is_the_model_with_them_as_they_were(policy, tmp_path):
    tokenizer = load_tokenizer(str(policy))
    folder = export_adapter(adapted(policy, ALL), policy, tokenizer=tokenizer, path=tmp_path / "adapter")
    whole = merge_adapter(folder, "float32", target=tmp_path / "whole")
    config = make_config(str(folder))
    assert started_lora(config.model.model_copy(update={"adapters": "merge"}), None) is None
    lora = started_lora(config.model, config.lora)
    assert lora is not None
    assert (lora.rank, lora.target_parameters) == (ALL.rank, sorted(EXPERTS))
    torch.manual_seed(0)
    trained = load_token_policy(config.model, TEMPERATURE, lora=lora).eval()
    plain = load_token_policy(config.model.model_copy(update={"path": str(whole)}), TEMPERATURE).eval()
    samples = batch(0)

    def logprobs(token_policy: Any) -> torch.Tensor:
        return torch.tensor([x for row in sample_logprobs(token_policy, samples, 64, device="cpu") for x in row])

    assert torch.allclose(logprobs(trained), logprobs(plain), atol=1e-5)
    assert all(".lora_" in name for name, weight in trained.named_parameters() if weight.requires_grad)
    first, start = logprobs(trained), StartAdapters(trained)
    with torch.no_grad():
        for item in trained_tensors(trained):
            for parameter in item.parameters:
                parameter.mul_(1.5)
    moved = logprobs(trained)
    assert float((moved - first).abs().mean()) > 1e-3
    with start.in_place():
        assert torch.equal(logprobs(trained), first)
    assert torch.equal(logprobs(trained), moved)
    again = export_adapter(trained.policy, policy, tokenizer=tokenizer, path=tmp_path / "again")
    merged = weights(merge_adapter(again, "float32", target=tmp_path / "whole again"))
    sent = values(whole_tensors(trained))
    assert all(torch.equal(sent[name], merged[name]) for name in merged)


def test_the_reference_of_continued_adapters_needs_no_process(policy, tmp_path):
    folder = export_adapter(adapted(policy, ALL), policy, tokenizer=load_tokenizer(str(policy)), path=tmp_path / "a")
    config = make_config(str(folder), loss={"reference": {"weight": 0.1}}).model_dump()
    config["model"]["adapters"] = "merge"
    with pytest.raises(ConfigError, match=r"loss\.reference and resources\.reference go together"):
        validate_config(RlConfig, config, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"dropout": 0.1}}, ["lora.dropout: unknown key"]),  # with it, every ratio would be wrong
        ({"lora": {}, "loss": {"reference": {"weight": 0.1, "path": "other"}}}, ["loss.reference and resources.ref"]),
        ({"loss": {"reference": {"weight": 0.1}}}, ["loss.reference and resources.reference go together"]),
    ],
)
def test_settings_that_do_not_go_with_adapters_are_refused(policy, changes, words):
    with pytest.raises(ConfigError) as caught:
        make_config(str(policy), **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_layouts_that_deepspeed_cannot_train_adapters_in_are_refused(policy, tmp_path):
    for zero, lora, words in ((1, {}, "parallel.zero 1"), (3, {"target_parameters": EXPERTS}, "AutoEP does not find")):
        config = make_config(str(policy), lora=lora, parallel=layout(2, zero))
        with pytest.raises(ConfigError, match=words):
            run(config, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stage_trains_adapters_that_its_engines_follow(ray_session, tiny_model, tmp_path):
    lora = {**LORA, "target_parameters": EXPERTS, "save": "both"}
    changes: dict[str, Any] = {
        "max_staleness": 0,
        "lora": lora,
        "optimizer": {"learning_rate": 1e-2},
        "loss": {"reference": {"weight": 0.05}},  # the policy without its adapters: no second model
        "resources": {"rollout": {"cpus": 0.5}, "trainer": {"cpus": 0.5}},
    }
    config = stage_config(tmp_path, tiny_model, rows_of(["math"]), steps=3, **changes)
    outputs, metrics = run_stage(config, tmp_path / "rl")
    events = list(read_jsonl(tmp_path / "rl" / "events.jsonl"))
    (checked,) = [event for event in events if event["event"] == "adapters_checked"]
    assert checked["effect"] >= 4e-3
    assert outputs["parity_mean_gap"] < 1e-5
    # On-policy: sampler and trainer agree only if the engines have the adapters of each step.
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    assert metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-7)
    assert all(line["reference_kl"] > 1e-7 for line in metrics[1:])
    start, whole = weights(tiny_model), weights(tmp_path / "rl" / "model")
    merged = weights(merge_adapter(tmp_path / "rl" / "adapter", "float32", target=tmp_path / "whole"))
    assert all(torch.equal(whole[name], merged[name]) for name in whole)
    changed = {name for name in start if not torch.equal(start[name], whole[name])}
    assert changed == {name for name in start if name.endswith(("q_proj.weight", "o_proj.weight", *EXPERTS))}
    # The same adapters are trained further; the reference is the policy with the adapters as they were.
    changes["lora"] = None
    config = stage_config(tmp_path, tmp_path / "rl" / "adapter", rows_of(["math"]), steps=2, **changes)
    outputs, metrics = run_stage(config, tmp_path / "further")
    assert outputs["parity_mean_gap"] < 1e-5
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    assert metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics[1]["reference_kl"] > 1e-7
    further = weights(tmp_path / "further" / "model")
    assert {name for name in whole if not torch.equal(whole[name], further[name])} == changed


def trainer_that_forgets_adapters(config: Any, seed: int) -> Any:
    """A trainer in whose messages to the engines the adapters are missing."""
    from posttrain.parallel import tensors
    from posttrain.rl.training import trainer

    trainer.sent_tensors = lambda model: [item for item in tensors._tensors(model) if ".lora_" not in item.name]
    return trainer.PolicyTrainer(config, seed)


@pytest.mark.slow
def test_training_is_refused_when_engines_are_sent_weights_without_adapters(
    ray_session, tiny_model, tmp_path, monkeypatch
):
    """New adapters change nothing, so the plain comparison of engines and trainer could not tell."""
    monkeypatch.setattr(
        "posttrain.rl.training.starts.TrainerClient", partial(TrainerClient, make=trainer_that_forgets_adapters)
    )
    config = stage_config(tmp_path, tiny_model, rows_of(["math"]), lora={"target_modules": ["v_proj"]})
    with pytest.raises(StageError, match="do not sample from the weights with the adapters of `lora`"):
        run_stage(config, tmp_path / "rl")
    assert not (tmp_path / "rl" / "metrics.jsonl").exists()
