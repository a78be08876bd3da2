"""LoRA on the parts of a multimodal model: what is written, merged, refused and continued, in SFT, DPO and RL."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from peft import PeftModel, get_peft_model
from transformers import Llama4ForConditionalGeneration
from vision_folder import REWARD, write_picture_pairs, write_picture_prompts, write_picture_rows
from vision_models import draw, save_vision_policy

from posttrain.config.base import validate_config
from posttrain.config.images import TrainedImagesConfig
from posttrain.config.models import TunedModelConfig
from posttrain.config.training import PARTS, LoraConfig, Part
from posttrain.context import StageContext
from posttrain.data.images.section import pictures_for
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import tile_rule
from posttrain.dpo import stage as dpo
from posttrain.dpo.config import DpoConfig
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.adapter_start import adapted_parts, start_problems
from posttrain.model.vision.parts import part_of
from posttrain.model.vision.tiling import tiles_for
from posttrain.parallel.adapters import export_adapter, merge_adapter
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS, load_schema
from posttrain.records import DrawnPrompt, Media, Prompt, Row
from posttrain.rl import stage as rl
from posttrain.rl.config import RlConfig
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.loop.adapter_check import PROMPTS, chosen_prompts
from posttrain.rl.training.policy import load_token_policy
from posttrain.sft import stage as sft
from posttrain.sft.config import SftConfig
from posttrain.tune.adapters import adapter_config

# q_proj is in the text model and the encoder, fc1 in the encoder alone, and linear_1 is the projector.
MODULES = ["q_proj", "v_proj", "fc1", "linear_1"]
EXPERTS = ["experts.down_proj"]
LORA = {"rank": 2, "alpha": 4.0, "target_modules": MODULES, "target_parameters": EXPERTS}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("policy") / "model")


def lora_of(frozen: tuple[Part, ...]) -> LoraConfig:
    """`LORA` without the targets that only these parts have."""
    own = {"fc1": "vision", "linear_1": "projector"}
    modules = [name for name in MODULES if own.get(name) not in frozen]
    experts = [] if "text" in frozen else EXPERTS
    return LoraConfig(**{**LORA, "target_modules": modules, "target_parameters": experts})


def adapted(policy: Path, frozen: tuple[Part, ...] = ()) -> Any:
    """The policy with adapters that change its logits."""
    model = load_model(policy, images=True)
    model = get_peft_model(model, adapter_config(model, lora_of(frozen), frozen))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def trained(policy) -> Any:
    return adapted(policy)


@pytest.fixture(scope="module")
def written(trained, policy, tmp_path_factory) -> Path:
    return export_adapter(
        trained, policy, tokenizer=load_tokenizer(policy), path=tmp_path_factory.mktemp("lora") / "adapter"
    )


@pytest.fixture(scope="module")
def asked(policy, tmp_path_factory) -> dict[str, torch.Tensor]:
    """A prompt with a picture, as arguments of a forward."""
    place = tmp_path_factory.mktemp("picture")
    store = ImageStore(place / "store")
    key = store.add((place / draw(place / "a.png", 3, (112, 56))).read_bytes()).key
    tokenizer = load_tokenizer(policy)
    rule = tile_rule(policy, tokenizer)
    ids = [5, 6, *rule.ids(112, 56), 7, 8, 9]
    return {"input_ids": torch.tensor([ids]), **tiles_for(store.path, str(policy)).inputs([key])}


def logits(model: Any, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in asked.items()}
    with torch.no_grad():
        return model(**inputs).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, images=True).state_dict())


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def targets(policy: Path, parts: set[Part]) -> set[str]:
    """The weights of these parts that `LORA` adapts."""
    ends = tuple(f"{name}.weight" for name in MODULES) + tuple(EXPERTS)
    return {name for name in weights(policy) if part_of(name) in parts and name.endswith(ends)}


def test_peft_adds_the_adapters_of_all_parts_to_transformers_model_and_merged_they_are_the_same(
    trained, written, policy, asked, tmp_path
):
    """The merged folder is whole, with the files of the processor, and transformers loads it too."""
    assert adapted_parts(written) == set(PARTS)
    theirs = Llama4ForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
    peers: Any = PeftModel.from_pretrained(theirs, written)
    whole = merge_adapter(written, "float32", target=tmp_path / "whole")
    with float64_inside():
        exact = logits(copy.deepcopy(peers).double(), asked)
    loaded = Llama4ForConditionalGeneration.from_pretrained(whole, dtype=torch.float32).eval()
    for model in (trained, load_model(whole, images=True), loaded):
        assert_as_exact(logits(model, asked), logits(peers, asked), exact)
    assert (exact - logits(load_model(policy, images=True), asked)).abs().max() > 0.1
    assert changed(policy, whole) == targets(policy, set(PARTS))
    assert tile_rule(whole, load_tokenizer(whole)) == tile_rule(policy, load_tokenizer(policy))


@pytest.mark.parametrize("frozen", [("vision",), ("text",), ("projector", "vision")])
def test_frozen_parts_get_no_adapters_in_rl_as_in_sft_and_such_adapters_are_continued(policy, frozen, tmp_path):
    rest: set[Part] = set(PARTS) - set(frozen)
    folder = export_adapter(adapted(policy, frozen), policy, tokenizer=load_tokenizer(policy), path=tmp_path / "a")
    assert adapted_parts(folder) == rest
    images = TrainedImagesConfig(freeze=list(reversed(frozen)))
    model = TunedModelConfig(path=str(folder), dtype="float32")
    assert start_problems(model, None, images) == []
    ImageStore(tmp_path / "store")
    for start, section in ((policy, lora_of(frozen)), (folder, LoraConfig(rank=2))):  # new adapters, and continued ones
        given = TunedModelConfig(path=str(start), dtype="float32")
        held = load_token_policy(given, 1.0, lora=section, images=images, store=tmp_path / "store")
        names = [name for name, weight in held.named_parameters() if weight.requires_grad]
        assert all(".lora_" in name for name in names)
        assert {part_of(name) for name in names} == rest
    (problem,) = start_problems(model, None, TrainedImagesConfig(freeze=[min(rest)]))
    assert problem.startswith(f"images.freeze: got {min(rest)}, which the adapters in model.path")


def config_of(kind: str, model: dict[str, Any], data: Path, **changes: Any) -> Any:
    named = {"sft": {"data": {"path": str(data)}, "max_length": 128}, "rl": {"prompts": {"path": str(data)}}}[kind]
    return validate_config(load_schema(KINDS[kind]), {"model": {"dtype": "float32", **model}, **named, **changes}, "t")


def test_what_does_not_go_with_adapters_is_refused_in_validate(written, policy, tmp_path):
    rows = write_picture_rows(tmp_path, 4)
    text = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "Sum: 1 + 1"}, {"role": "assistant", "content": "Answer: 2"}]
    text.write_text(json.dumps({"messages": turns}) + "\n")
    (problem,) = input_problems(config_of("sft", {"path": str(written)}, text), KINDS["sft"])
    assert "its adapters are those of a multimodal model; set images: {}" in problem
    for images, module in ((None, "fc1"), ({"freeze": ["vision"]}, "fc1"), ({"freeze": ["projector"]}, "linear_1")):
        lora = {"target_modules": [module]}
        data = rows if images else text
        config = config_of("sft", {"path": str(policy)}, data, lora=lora, images=images)
        (problem,) = input_problems(config, KINDS["sft"])
        assert problem.startswith(f"lora.target_modules: got {module}: the linear modules to choose from are")
    model = load_model(policy, images=True)
    with pytest.raises(ConfigError, match=r"lora\.target_modules: got fc1"):
        adapter_config(model, LoraConfig(target_modules=["fc1"]), ["vision"])
    of_text = get_peft_model(load_model(policy), adapter_config(load_model(policy), LoraConfig()))
    folder = export_adapter(of_text, policy, tokenizer=load_tokenizer(policy), path=tmp_path / "of text")
    assert adapted_parts(folder) == set()
    for adapters in ("continue", "merge"):
        config = config_of("sft", {"path": str(folder), "adapters": adapters}, rows, images={})
        (problem,) = input_problems(config, KINDS["sft"])
        assert problem.startswith(f"images: got the adapters {str(folder)!r}, which were trained on the text model")
        config = config_of("sft", {"path": str(folder), "adapters": adapters}, text)
        assert input_problems(config, KINDS["sft"]) == []


def test_the_tokens_of_pictures_follow_from_the_base_of_adapters(written, policy, tmp_path):
    ImageStore(tmp_path / "store")
    tokenizer = load_tokenizer(policy)
    found = pictures_for(ImageStore(tmp_path / "store"), policy, tokenizer)
    assert found is not None
    tiles = tiles_for(tmp_path / "store", str(written))
    assert tiles.patch_id == found.rule.patch


def test_half_of_the_prompts_by_which_adapters_are_compared_show_pictures():
    def drawn(number: int, media: bool) -> DrawnPrompt:
        prompt = Prompt((), (number,), (Media("store#key"),) if media else ())
        return DrawnPrompt(Row(str(number), "c", ()), None, prompt)

    prompts = [drawn(number, number >= 60) for number in range(100)]
    found = chosen_prompts(prompts)
    assert [int(item.row.id) for item in found] == [*range(60, 68), *range(8)]
    assert chosen_prompts(prompts[:60]) == prompts[:PROMPTS]
    assert chosen_prompts(prompts[58:]) == prompts[60:68] + prompts[58:60] + prompts[68:74]


def context_of(folder: Path) -> StageContext:
    folder.mkdir(parents=True)
    return StageContext(folder.name, folder, folder / "events.jsonl", 0)


@pytest.mark.slow
def test_sft_and_then_dpo_train_adapters_of_all_parts(ranks, policy, tmp_path):
    """SFT writes adapters alone, with the encoder left out of them; DPO goes on with them, and writes both."""
    given = {"optimizer": {"learning_rate": 1e-2}, "images": {"freeze": ["vision"], "learning_rates": {"text": 2e-2}}}
    lora = {**LORA, "target_modules": ["q_proj", "v_proj", "linear_1"], "save": "adapter"}
    settings = {
        "model": {"path": str(policy), "dtype": "float32"},
        "data": {"path": str(write_picture_rows(tmp_path / "rows", 12))},
        "batch_tokens": 256, "max_length": 128, "epochs": 2, "lora": lora, **given,
    }  # fmt: skip
    result = sft.run(validate_config(SftConfig, settings, "test"), context_of(tmp_path / "sft"))
    assert result["loss_last"] < result["loss_first"]
    middle = Path(result["model"])
    assert adapted_parts(middle) == {"projector", "text"}
    first = merge_adapter(middle, "float32", target=tmp_path / "middle")
    assert changed(policy, first) == targets(policy, {"projector", "text"})
    settings = {
        "model": {"path": str(middle), "dtype": "float32"},
        "pairs": {"path": str(write_picture_pairs(tmp_path / "pairs", range(12)))},
        "batch_size": 4, "max_length": 128, "lora": {"save": "both"}, **given,
    }  # fmt: skip
    dpo.run(validate_config(DpoConfig, settings, "test"), context_of(tmp_path / "dpo"))
    losses = [line["loss"] for line in read_jsonl(tmp_path / "dpo/metrics.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference: the adapters as SFT wrote them
    whole, merged = (
        tmp_path / "dpo/model",
        merge_adapter(tmp_path / "dpo/adapter", "float32", target=tmp_path / "whole"),
    )
    assert changed(whole, merged) == set()
    assert changed(first, whole) == targets(policy, {"projector", "text"})
    tile_rule(whole, load_tokenizer(whole))


@pytest.mark.slow
def test_rl_trains_adapters_of_all_parts_that_its_engines_follow(ray_session, policy, tmp_path):
    """On-policy, so that sampler and trainer agree only if the engines have the adapters of each step, in the encoder
    too; then the same adapters are trained further, against themselves as they were."""
    (tmp_path / "reward.py").write_text(REWARD)
    settings: dict[str, Any] = {
        "model": {"path": str(policy), "dtype": "float32"},
        "prompts": {"path": str(write_picture_prompts(tmp_path, 12))},
        "reward": {"name": f"{tmp_path}/reward.py:even_share"},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.1, "max_num_seqs": 24, "stream_interval": 4,
                   "deadline_s": 20.0},
        "sampling": {"max_tokens": 24}, "images": {"learning_rates": {"vision": 2e-2}}, "groups_per_step": 4,
        "group_size": 4, "max_staleness": 0, "lora": {**LORA, "save": "both"}, "steps": 3,
        "optimizer": {"learning_rate": 1e-2}, "loss": {"reference": {"weight": 0.05}},
        "resources": {"rollout": {"cpus": 0.5}, "trainer": {"cpus": 0.5}},
    }  # fmt: skip
    folder = tmp_path / "rl"
    folder.mkdir()
    context = StageContext("rl", folder, folder / "events.jsonl", seed=3, warm_engines=True)
    outputs = rl.run(validate_config(RlConfig, settings, "test"), context)
    assert outputs["parity_mean_gap"] < 1e-4
    (checked,) = [event for event in read_jsonl(context.events) if event["event"] == "adapters_checked"]
    assert checked["effect"] >= 4e-3
    metrics = list(read_jsonl(folder / "metrics.jsonl"))
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    assert metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-7)
    assert all(line["reference_kl"] > 1e-7 for line in metrics[1:])
    audit = audit_stage(folder)
    assert audit.is_clean, audit.problems
    assert changed(policy, folder / "model") == targets(policy, set(PARTS))
    merged = merge_adapter(folder / "adapter", "float32", target=tmp_path / "whole")
    assert changed(folder / "model", merged) == set()
    further = {**settings, "model": {"path": str(folder / "adapter"), "dtype": "float32"}, "lora": None, "steps": 2}
    place = tmp_path / "further"
    place.mkdir()
    context = StageContext("rl", place, place / "events.jsonl", seed=3, warm_engines=True)
    outputs = rl.run(validate_config(RlConfig, further, "test"), context)
    assert outputs["parity_mean_gap"] < 1e-4
    metrics = list(read_jsonl(place / "metrics.jsonl"))
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    assert metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics[1]["reference_kl"] > 1e-7
    assert changed(folder / "model", place / "model") == targets(policy, set(PARTS))
