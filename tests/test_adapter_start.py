"""Training that starts from adapters and goes on with them: what is trained, DPO's reference, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import adapted, change
from test_dpo import make_config as dpo_config
from test_dpo import make_pairs, reply_logprob
from test_sft import make_config, make_context, weights

from posttrain.config.models import TunedModelConfig
from posttrain.config.training import LoraConfig
from posttrain.data.pairs import write_pairs
from posttrain.dpo import stage as dpo
from posttrain.dpo.examples import blank_record, to_record, tokenize_pairs
from posttrain.dpo.trainer import PairTrainer
from posttrain.errors import CheckpointError, ConfigError
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.adapter import adapter_problems, base_mark
from posttrain.model.adapter_start import adapter_note, adapter_settings, start_problems, started_lora
from posttrain.model.load import load_policy
from posttrain.parallel.adapters import export_adapter, merge_adapter, with_adapters
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS
from posttrain.sft import stage as sft
from posttrain.tune.steps import rows_and_blank

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"], target_parameters=["experts.down_proj"])


@pytest.fixture(scope="module")
def start(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that change the policy's logits, without a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("start") / "adapter"
    export_adapter(adapted(policy, LORA), policy, tokenizer=load_tokenizer(policy), path=folder)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(start, tmp_path / "adapter"))


def model_section(path: Path, **keys: Any) -> TunedModelConfig:
    return TunedModelConfig(path=str(path), dtype="float32", **keys)


def test_the_section_lora_is_that_of_the_adapters(start):
    assert adapter_settings(start) == LORA
    assert started_lora(model_section(start), None) == LORA
    given = LoraConfig(rank=2, target_modules=["v_proj", "q_proj"], save="adapter")
    assert started_lora(model_section(start), given) == LORA.model_copy(
        update={"save": "adapter", "target_modules": ["v_proj", "q_proj"]}
    )
    fresh = started_lora(model_section(start, adapters="merge"), LoraConfig(rank=8))
    assert fresh is not None
    assert (fresh.rank, fresh.alpha, fresh.target_parameters) == (8, 32.0, [])
    assert started_lora(model_section(start, adapters="merge"), None) is None


@pytest.mark.parametrize(
    ("lora", "settings", "words"),
    [
        ({"rank": 8}, {}, ["lora.rank: got 8", "have 2", "model.adapters: merge"]),
        ({"alpha": 8.0}, {}, ["lora.alpha: got 8.0", "have 4.0"]),
        ({"target_modules": ["q_proj"]}, {}, ["lora.target_modules: got ['q_proj']", "['q_proj', 'v_proj']"]),
        ({"target_parameters": []}, {}, ["lora.target_parameters: got []", "experts.down_proj"]),
        ({"dropout": 0.1}, {}, ["lora.dropout: got 0.1", "dropout: 0.0"]),
        (None, {"target_modules": ["lm_head"]}, ["adapt lm_head", "model.adapters: merge"]),
        (None, {"use_dora": True}, ["model.path: got", "use_dora True", "model.adapters: merge"]),
        (None, {"rank_pattern": {"q_proj": 4}}, ["rank_pattern {'q_proj': 4}"]),
        (None, {"target_modules": ".*q_proj"}, ["the pattern '.*q_proj'"]),
    ],
)
def test_a_section_that_disagrees_with_the_adapters_is_refused_in_validate(folder, data, lora, settings, words):
    change(folder, **settings)
    config = make_config(folder, data, lora=lora)
    (problem,) = input_problems(config, KINDS["sft"])
    assert all(word in problem for word in words), problem
    with pytest.raises(ConfigError, match=r"config: (lora|model.path)"):
        started_lora(config.model, config.lora)
    merged = config.model_copy(update={"model": config.model.model_copy(update={"adapters": "merge"})})
    assert start_problems(merged.model, merged.lora) == []


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["query"]}, ["lora.target_modules: got query: the linear modules", "q_proj", "up_proj"]),
        ({"target_modules": ["embed_tokens"]}, ["lora.target_modules: got embed_tokens"]),
        ({"target_parameters": ["down_proj"]}, ["lora.target_parameters: got down_proj", "experts.down_proj"]),
    ],
)
def test_targets_that_the_model_lacks_are_refused_in_validate(policy, data, lora, words):
    (problem,) = input_problems(make_config(policy, data, lora=lora), KINDS["sft"])
    assert all(word in problem for word in words), problem
    assert (
        input_problems(make_config(policy, data, lora={"target_parameters": ["experts.down_proj"]}), KINDS["sft"]) == []
    )


def test_layouts_in_which_adapters_cannot_be_trained_are_refused_in_validate(start, policy, data):
    divided = {"parallel": {"processes": 2, "expert": 2, "zero": 3}}
    (problem,) = input_problems(make_config(start, data, **divided), KINDS["sft"])  # its experts have adapters
    assert problem.startswith("parallel.expert: got 2 with lora.target_parameters: AutoEP does not find experts")
    assert input_problems(make_config(policy, data, lora={}, **divided), KINDS["sft"]) == []
    assert input_problems(make_config(policy, data, **divided), KINDS["sft"]) == []


def test_adapters_that_name_no_modules_cannot_be_continued(folder):
    change(folder, target_modules=[], target_parameters=None)
    assert "name no modules; list their names" in start_problems(model_section(folder), None)[0]


def test_people_are_told_what_a_folder_of_adapters_is(start, policy):
    note = adapter_note("model", model_section(start))
    names = "experts.down_proj, q_proj, v_proj"
    assert note == (
        f"model.path holds adapters, rank 2, of {names}; they need the base {policy}; the training continues them"
    )
    assert "they are merged into it" in str(adapter_note("model", model_section(start, adapters="merge")))
    assert adapter_note("model", model_section(policy)) is None


def test_a_base_that_has_changed_is_one_message(folder, policy, data, tmp_path):
    base = Path(shutil.copytree(policy, tmp_path / "base"))
    change(folder, base_model_name_or_path=str(base))
    assert adapter_problems(folder) == []  # the same model in another place
    model = load_model(base)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    model.save_pretrained(base)
    (problem,) = input_problems(make_config(folder, data), KINDS["sft"])
    assert f"its base {str(base)!r} is not the model that the adapters were trained on, or has changed since" in problem
    assert f"mark {base_mark(base)}, and base.json notes {base_mark(policy)}" in problem
    with pytest.raises(CheckpointError, match="has changed since"):
        merge_adapter(folder, "float32", target=tmp_path / "whole")
    (folder / "base.json").unlink()
    assert adapter_problems(folder) == []


def test_the_loss_of_dpo_is_the_formula_with_the_adapters_as_they_were_as_reference(start, policy, tmp_path):
    """From the stage's trainer, with adapters that have moved, against DPO written out in float64."""
    from trl.trainer.dpo_config import DPOConfig

    ids, _ = tokenize_pairs(load_tokenizer(start), make_pairs(4), 128, overlong="error")
    config = dpo_config(start, pairs={"path": "x"}, batch_size=4, beta=0.3)
    trainer = PairTrainer(
        model=with_adapters(load_policy(config.model), start, trainable=True),
        args=DPOConfig(**dpo.trainer_arguments(config, tmp_path)),
        train_dataset=rows_and_blank([to_record(item) for item in ids], blank_record(ids[0])),
        processing_class=load_tokenizer(start),
        **dpo.trainer_options(config),
    )
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_" in name and ".default." in name for name in names)
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]  # no copy stays
    reference = load_model(merge_adapter(start, "float32", target=tmp_path / "whole"))
    base = load_model(policy)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item()

        def written_out(against: Any) -> float:
            total = torch.zeros((), dtype=torch.float64)
            for item in ids:
                now, then = (
                    [reply_logprob(m, item.prompt_ids, reply).sum() for reply in (item.chosen_ids, item.rejected_ids)]
                    for m in (trainer.model, against)
                )
                total -= torch.nn.functional.logsigmoid(0.3 * ((now[0] - then[0]) - (now[1] - then[1])))
            return float(total / len(ids))

        assert loss == pytest.approx(written_out(reference), abs=1e-5)
        assert abs(loss - written_out(base)) > 1e-3  # the reference is not the bare base


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, pytest.param({"processes": 2, "zero": 3}, marks=pytest.mark.full)])
def test_sft_and_then_dpo_go_on_with_the_same_adapters(ranks, start, policy, data, tmp_path, layout):
    given = {"parallel": layout, "resources": {"trainer": {"cpus": 0.25}}, "optimizer": {"learning_rate": 1e-2}}
    config = make_config(start, data, lora={"save": "adapter"}, **given)
    result = sft.run(config, make_context(tmp_path / "sft"))
    assert result["loss_last"] < result["loss_first"]
    middle = Path(result["model"])
    settings = [json.loads((path / "adapter_config.json").read_text()) for path in (start, middle)]
    same = ("r", "lora_alpha", "target_parameters", "base_model_name_or_path")
    assert [settings[0][name] for name in same] == [settings[1][name] for name in same]
    write_pairs(tmp_path / "in.jsonl", make_pairs(16))
    config = dpo_config(
        middle, pairs={"path": str(tmp_path / "in.jsonl")}, lora={"rank": 2, "save": "both"}, epochs=2, **given
    )
    dpo.run(config, make_context(tmp_path / "dpo"))
    losses = [line["loss"] for line in read_jsonl(tmp_path / "dpo" / "metrics.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the start: the adapters as SFT wrote them
    assert losses[-1] < losses[0]
    whole = weights(tmp_path / "dpo" / "model")
    merged = weights(merge_adapter(tmp_path / "dpo" / "adapter", "float32", target=tmp_path / "whole"))
    assert all(torch.equal(whole[name], merged[name]) for name in whole)
    base, first = weights(policy), weights(merge_adapter(middle, "float32", target=tmp_path / "middle"))
    moved = {name for name in base if not torch.equal(base[name], whole[name])}
    assert moved == {n for n in base if n.endswith(("q_proj.weight", "v_proj.weight", "experts.down_proj"))}
    assert any(not torch.equal(first[name], whole[name]) for name in moved)
