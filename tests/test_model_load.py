"""Model folders: a saved model can be loaded, and each fault of a folder is one clear message."""

import json
import os

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from safetensors.torch import load_file, save_file
from test_model_router import IDS, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from posttrain.errors import CheckpointError
from posttrain.model import NativeLlama4ForCausalLM, load_model, load_tokenizer, save_model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")))


@pytest.fixture
def folder(tmp_path):
    return save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")


def test_a_saved_model_loads_with_equal_weights_and_logits(folder):
    peer = load_model(folder, "transformers")(IDS).logits
    with float64_inside():
        exact = load_model(folder, "transformers").double()(IDS).logits
    torch.testing.assert_close(dict(load_model(folder).state_dict()), dict(tiny_model().state_dict()), rtol=0, atol=0)
    for implementation, model_class in (("native", NativeLlama4ForCausalLM), ("transformers", Llama4ForCausalLM)):
        model = load_model(folder, implementation)
        assert type(model) is model_class
        assert model.dtype == torch.float32
        assert not model.training
        assert_as_exact(model(IDS).logits, peer, exact)
    assert load_tokenizer(folder)("a").input_ids == [0]
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_bf16_weights_are_written_as_bf16(tmp_path):
    path = save_model(tiny_model().bfloat16(), tiny_tokenizer(), tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}


def test_given_weights_are_written_in_place_of_the_models_own(tmp_path):
    model = tiny_model()
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    path = save_model(model, tiny_tokenizer(), tmp_path / "model", state_dict=weights)
    assert not load_model(path)(IDS).logits.any()


def test_saving_replaces_an_older_folder_and_leaves_nothing_beside_it(folder):
    (folder / "old.txt").write_text("old")
    save_model(tiny_model(), tiny_tokenizer(), folder)
    assert not (folder / "old.txt").exists()
    assert os.listdir(folder.parent) == ["model"]


def test_a_save_that_fails_leaves_the_older_folder_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(AttributeError):
        save_model(tiny_model().bfloat16(), None, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert os.listdir(folder.parent) == ["model"]


def test_other_architectures_come_from_transformers(tmp_path):
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    path = save_model(LlamaForCausalLM(config), tiny_tokenizer(), tmp_path / "llama")
    assert type(load_model(path)) is LlamaForCausalLM


def test_the_text_model_of_a_multimodal_folder_is_loaded(tmp_path):
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=tiny_model().config.to_dict(), vision_config=vision)
    whole = Llama4ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is NativeLlama4ForCausalLM
    peer = whole.language_model(IDS).logits
    with float64_inside():
        assert_as_exact(model(IDS).logits, peer, whole.double().language_model(IDS).logits)


def _edit(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def _cut(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARDS = {"weight_map": {NORM: "gone.safetensors"}}


def _index_alone(folder):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(SHARDS))


FAULTS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
    "unknown type": (lambda folder: (folder / "config.json").write_text('{"model_type": "nope"}'), "nope"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only a pickle checkpoint",
    ),
    "cut header": (_cut(10), "corrupt or truncated"),
    "cut data": (_cut(3000), "corrupt or truncated"),
    "missing tensor": (_edit(lambda tensors: tensors.pop(NORM)), f"1 missing tensors: {NORM}"),
    "many missing tensors": (_edit(lambda tensors: [tensors.pop(n) for n in list(tensors)[:8]]), "and 3 more"),
    "unknown tensor": (_edit(lambda tensors: tensors.update(extra=torch.ones(2))), "1 unknown tensors: extra"),
    "other shape": (
        _edit(lambda tensors: tensors.update({NORM: torch.ones(3)})),
        rf"another shape .*{NORM} is \[3\], must be \[16\]",
    ),
    "shard missing": (_index_alone, "lacks gone.safetensors, which .* lists"),
    "broken index": (lambda folder: (folder / INDEX).write_text("[]"), "cannot be read as an index of weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_model_folder_is_one_message(fault, folder):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_missing_tokenizer_are_refused(tmp_path, folder):
    for read in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="no such folder"):
            read(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(folder)


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(folder)


def test_an_unknown_implementation_or_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="implementation is 'jax'"):
        load_model(folder, "jax")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_model(folder, dtype="int8")
