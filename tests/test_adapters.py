"""Folders of adapters: that peft reads what is written, that merging one gives the same model, what is refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.cli.main import main
from posttrain.config.base import validate_config
from posttrain.config.training import LoraConfig
from posttrain.context import StageContext
from posttrain.errors import CheckpointError
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.adapter import adapter_problems, base_folder, is_adapter
from posttrain.parallel.adapters import export_adapter, merge_adapter
from posttrain.parallel.export import without_adapters
from posttrain.parallel.tensors import read_weights, whole_tensors
from posttrain.pipeline.adapters import forget_whole_models, with_whole_models
from posttrain.pipeline.hashing import path_hash
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS, load_schema
from posttrain.tune.adapters import adapter_config

LORA = LoraConfig(
    rank=3,
    alpha=6.0,
    target_modules=["q_proj", "o_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
IDS = torch.arange(3, 30)[None]


def adapted(policy: Path, lora: LoraConfig) -> Any:
    """The policy with adapters that change its logits."""
    model = load_model(policy)
    with_adapters = get_peft_model(model, adapter_config(model, lora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in with_adapters.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return with_adapters


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(policy) -> Any:
    return adapted(policy, LORA)


@pytest.fixture(scope="module")
def written(trained, policy, tmp_path_factory) -> Path:
    """The adapters' folder. The fixture is asked for by every test that merges `trained`, which comes last."""
    return export_adapter(
        trained, policy, tokenizer=load_tokenizer(policy), path=tmp_path_factory.mktemp("lora") / "adapter"
    )


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of the adapters that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_peft_reads_the_adapters_and_merging_their_folder_is_the_trained_model(trained, written, policy, tmp_path):
    assert {path.name for path in written.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    peers = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), written)
    ours = load_model(merge_adapter(written, "float32", target=tmp_path / "whole"))
    assert load_tokenizer(tmp_path / "whole").get_vocab() == load_tokenizer(policy).get_vocab()
    with torch.no_grad(), float64_inside():
        exact = copy.deepcopy(peers).double()(input_ids=IDS).logits
    for model in (ours, trained):
        assert_as_exact(logits(model), logits(peers), exact)
    assert (logits(ours) - logits(load_model(policy))).abs().max() > 0.1
    tensors = whole_tensors(without_adapters(copy.deepcopy(trained)))
    merged = {item.name: value.clone() for item, value in read_weights(tensors)}
    assert all(torch.equal(value, merged[name]) for name, value in ours.state_dict().items())  # bit for bit


def test_the_command_merges_adapters_and_refuses_what_is_none(written, policy, tmp_path, capsys):
    assert main(["merge", str(written), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "whole")
    merged = load_model(merge_adapter(written, "float32", target=tmp_path / "again")).state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in load_model(tmp_path / "whole").state_dict().items())
    for arguments, words in (
        ([str(policy), str(tmp_path / "new")], "it holds a whole model, with nothing to merge"),
        ([str(written), str(tmp_path / "whole")], "it exists already"),
        ([str(tmp_path / "none"), str(tmp_path / "new")], "no such folder"),
    ):
        assert main(["merge", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 2.0}}, {"use_dora": True}])
def test_the_variants_of_lora_that_peft_merges_are_merged(policy, tmp_path, settings):
    model = load_model(policy)
    config = adapter_config(model, LoraConfig(rank=2, target_modules=["q_proj"]))
    for name, value in settings.items():
        setattr(config, name, value)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(policy))
    whole = load_model(merge_adapter(tmp_path / "adapter", "float32", target=tmp_path / "whole"))
    assert torch.allclose(logits(whole), logits(model), atol=1e-4)
    assert (logits(whole) - logits(load_model(policy))).abs().max() > 0.01
    assert load_tokenizer(tmp_path / "whole").get_vocab() == load_tokenizer(policy).get_vocab()  # the base's


def test_a_folder_of_a_whole_model_is_its_own_base(policy, written):
    assert (is_adapter(policy), base_folder(policy)) == (False, policy)
    assert (is_adapter(written), base_folder(written)) == (True, policy)
    assert adapter_problems(written) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: got PREFIX_TUNING: only LORA adapters are read"),
        ({"base_model_name_or_path": "meta/none"}, "base_model_name_or_path: got 'meta/none': no such folder; set it"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is not set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: got ['lm_head']: such an adapter is more than"),
        ({"bias": "all"}, "bias: got all"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got pissa_niter_4: its training changed the base"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_in_validate(folder, settings, message):
    change(folder, **settings)
    config = validate_config(
        load_schema(KINDS["sft"]), {"model": {"path": str(folder)}, "data": {"path": "${x.y}"}}, ""
    )
    (problem,) = input_problems(config, KINDS["sft"])
    assert problem.startswith(f"model.path: got {str(folder)!r}: ")
    assert message in problem
    with pytest.raises(CheckpointError, match=r"adapter: "):
        merge_adapter(folder, "float32", target=folder / "whole")
    assert not (folder / "whole").exists()


def test_an_adapter_of_an_adapter_and_a_base_of_another_shape_are_refused(folder, policy, tmp_path):
    change(folder, base_model_name_or_path=str(folder))
    assert "which is an adapter itself" in adapter_problems(folder)[0]
    from tiny_policy import save_tiny_policy

    wide = save_tiny_policy(tmp_path / "wide", hidden_size=48)
    change(folder, base_model_name_or_path=str(wide))
    (problem,) = adapter_problems(folder)
    assert "self_attn.q_proj with 32 inputs, of which the base has 48" in problem
    change(
        folder,
        base_model_name_or_path=str(save_tiny_policy(tmp_path / "short", num_hidden_layers=2, no_rope_layers=[1, 0])),
    )
    change(folder, target_parameters=None)
    assert "which the base lacks" in adapter_problems(folder)[0]


def test_damaged_adapters_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "q_proj.lora_A" not in name}, path)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors and adapter_config.json do not agree on"):
        merge_adapter(folder, "float32", target=folder / "whole")
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read as safetensors" in adapter_problems(folder)[0]
    path.unlink()
    assert adapter_problems(folder) == ["no adapter_model.safetensors; pickled weights are not loaded"]
    with pytest.raises(CheckpointError, match="holds adapters and no whole model"):
        load_model(folder)


def test_the_faults_of_a_base_are_named(folder, policy, tmp_path):
    base = Path(shutil.copytree(policy, tmp_path / "base"))
    change(folder, base_model_name_or_path=str(base))
    (base / "config.json").unlink()
    config = validate_config(
        load_schema(KINDS["sft"]), {"model": {"path": str(folder)}, "data": {"path": "${x.y}"}}, ""
    )
    assert "its base: got" in input_problems(config, KINDS["sft"])[0]
    assert "no config.json" in input_problems(config, KINDS["sft"])[0]


@pytest.mark.parametrize("kind", ["sft", "dpo", "rl", "eval"])
def test_a_stage_is_given_a_whole_model_in_place_of_adapters(kind, written, policy, tmp_path):
    model = {"path": str(written), "dtype": "float32", **({"adapters": "merge"} if kind != "eval" else {})}
    more: dict[str, Any] = {
        "sft": {"data": {"path": "d.jsonl"}},
        "dpo": {"pairs": {"path": "d.jsonl"}},
        "rl": {"prompts": {"path": "d.jsonl"}, "reward": {"name": "final_answer"}, "steps": 1},
        "eval": {"data": {"path": "d.jsonl"}, "reward": {"name": "final_answer"}},
    }[kind]
    config = validate_config(load_schema(KINDS[kind]), {"model": model, **more}, kind)
    context = StageContext(kind, tmp_path, tmp_path / "events.jsonl")
    whole = with_whole_models(config, KINDS[kind], context)
    assert whole.model.path == str(tmp_path / "merged" / "model")
    assert whole.model_copy(update={"model": config.model}) == config
    assert torch.equal(logits(load_model(whole.model.path)), logits(load_model(whole.model.path)))
    before = path_hash(Path(whole.model.path))
    assert with_whole_models(config, KINDS[kind], context) == whole  # not merged again
    assert sum("merging adapters" in str(event) for event in read_jsonl(context.events)) == 1
    forget_whole_models(whole, context)
    assert not (tmp_path / "merged").exists()
    assert path_hash(Path(with_whole_models(config, KINDS[kind], context).model.path)) == before
    plain = config.model_copy(update={"model": config.model.model_copy(update={"path": str(policy)})})
    assert with_whole_models(plain, KINDS[kind], context) is plain
    if kind != "eval":  # by default the stage itself goes on training the adapters
        going_on = config.model_copy(update={"model": config.model.model_copy(update={"adapters": "continue"})})
        assert with_whole_models(going_on, KINDS[kind], context) is going_on


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("filter", {"judge": {"path": "ADAPTERS", "dtype": "float32"}, "data": {"path": "d.jsonl"}}),
        (
            "rl",
            {
                "model": {"path": "POLICY"},
                "prompts": {"path": "d.jsonl"},
                "reward": {"name": "judged"},
                "judge": {"model": {"path": "ADAPTERS", "dtype": "float32"}},
                "resources": {"judge": {}, "reference": {}},
                "loss": {"reference": {"weight": 0.1, "path": "ADAPTERS"}},
            },
        ),
    ],
)
def test_a_judge_and_a_reference_may_be_adapters(kind, given, written, policy, tmp_path):
    text = json.dumps(given).replace("ADAPTERS", str(written)).replace("POLICY", str(policy))
    config = validate_config(load_schema(KINDS[kind]), json.loads(text), kind)
    context = StageContext(kind, tmp_path, tmp_path / "events.jsonl")
    whole = with_whole_models(config, KINDS[kind], context)
    judge = whole.judge if kind == "filter" else whole.judge.model
    paths = [judge.path] if kind == "filter" else [judge.path, whole.loss.reference.path]
    for path in paths:
        assert Path(path).is_relative_to(tmp_path / "merged")
        assert (logits(load_model(path)) - logits(load_model(policy))).abs().max() > 0.1


def test_what_new_adapters_stand_on_is_kept_and_nothing_else(written, tmp_path):
    context = StageContext("sft", tmp_path, tmp_path / "events.jsonl")
    for adapters, is_kept in (("merge", True), ("continue", False)):  # those that go on stand on the base of before
        model = {"path": str(written), "adapters": adapters}
        given = {"model": model, "data": {"path": "d.jsonl"}, "lora": {"save": "adapter"}}
        config = validate_config(load_schema(KINDS["sft"]), given, "sft")
        (tmp_path / "merged").mkdir(exist_ok=True)
        forget_whole_models(config, context)
        assert (tmp_path / "merged").exists() == is_kept
