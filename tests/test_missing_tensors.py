"""A tensor that is missing inside whole weight files is found from config.json and the files' headers alone."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Llama4TextConfig

from posttrain.errors import CheckpointError
from posttrain.model.load import load_model, save_model
from posttrain.model.native import NativeLlama4ForCausalLM
from posttrain.model.tensors import UNIFORM, llama4_tensors, missing_tensor_problems
from posttrain.pipeline.model_folders import model_folder_problems

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def write(folder: Path, config: Any, names: list[str]) -> Path:
    """A folder whose weight file has these tensors, of one number each."""
    config.save_pretrained(folder)
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "keys",
    [{}, {"interleave_moe_layer_step": 2}, {"moe_layers": [1, 3]}, {"attention_bias": True}, {"moe_layers": []},
     {"tie_word_embeddings": True}],
)  # fmt: skip
def test_the_names_of_llama_4_are_those_of_the_model(keys: dict[str, Any], tmp_path: Path) -> None:
    config = Llama4TextConfig(**SMALL, intermediate_size_mlp=16, num_local_experts=2, **keys)
    with torch.device("meta"):
        model = NativeLlama4ForCausalLM(config)
    needed = list(llama4_tensors(config.to_dict()))
    tied = {"lm_head.weight"} if keys.get("tie_word_embeddings") else set()
    assert set(needed) == set(model.state_dict()) - tied
    assert missing_tensor_problems(write(tmp_path, config, needed)) == []
    lost = random.Random(str(keys)).choice(needed)
    (problem,) = missing_tensor_problems(write(tmp_path, config, [name for name in needed if name != lost]))
    assert f"without 1 of the tensors that its config.json asks for: {lost};" in problem


@pytest.mark.parametrize("kind", UNIFORM)
def test_each_layer_of_a_uniform_model_needs_what_any_has(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **SMALL)
    with torch.device("meta"):
        names = sorted(AutoModelForCausalLM.from_config(config).state_dict())
    assert missing_tensor_problems(write(tmp_path, config, names)) == []
    layered = [name for name in names if name.startswith("model.")]
    for lost in random.Random(kind).sample(layered, 4):
        (problem,) = missing_tensor_problems(write(tmp_path, config, [name for name in names if name != lost]))
        assert lost in problem
    without = [name for name in names if not name.startswith("model.layers.2.")]
    (problem,) = missing_tensor_problems(write(tmp_path, config, without))
    assert "model.layers.2." in problem
    assert "; copy or download the weights again" in problem


def test_validate_names_what_the_trainer_would_miss(policy: Path, tmp_path: Path) -> None:
    """The same folder is refused by `validate` and by the loader, and the whole one by neither."""
    from posttrain.model.tokenizer import load_tokenizer

    folder = save_model(load_model(policy), load_tokenizer(policy), tmp_path / "model")
    assert model_folder_problems(str(folder)) == []
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = [name for name in tensors if name.startswith("model.layers.1.self_attn.")]
    save_file({name: value for name, value in tensors.items() if name not in gone}, file, metadata={"format": "pt"})
    (line,) = model_folder_problems(str(folder))
    assert f"{folder}" in line
    assert f"without {len(gone)} of the tensors" in line
    with pytest.raises(CheckpointError, match=f"{len(gone)} missing tensors"):
        load_model(folder)


def test_other_models_and_damaged_files_are_left_to_other_checks(tmp_path: Path) -> None:
    folder = write(tmp_path, AutoConfig.for_model("llama", **SMALL), ["model.norm.weight"])
    assert missing_tensor_problems(folder)
    config = json.loads((folder / "config.json").read_text())
    for other in ({**config, "model_type": "qwen3_moe"}, {**config, "quantization_config": {"quant_method": "gptq"}}):
        (folder / "config.json").write_text(json.dumps(other))
        assert missing_tensor_problems(folder) == []
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"short")
    assert missing_tensor_problems(folder) == []
