"""Llama 4 with images, native, against transformers' Llama4ForConditionalGeneration and float64."""

import copy
import json

import pytest
import torch
from closeness import assert_as_exact, error_and_bound, float64_inside
from safetensors.torch import load_file, save_file
from test_model import gradients
from test_model_load import tiny_tokenizer
from test_model_router import tiny_model
from tiny_vision import FEATURES, PATCH_ID, batch, document, pixels, vision_config, vision_pair
from transformers import Llama4ForConditionalGeneration

from posttrain.errors import CheckpointError
from posttrain.model import load_model, save_model
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.vision import encoder
from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration, image_places
from posttrain.model.vision.parts import freeze, part_of
from posttrain.model.vision.sizes import vision_sizes

# The pictures of each row, as their numbers of tiles.
ROWS = {
    "text": [[]],
    "one picture": [[1]],
    "two pictures": [[1, 5]],
    "eight pictures": [[1] * 8],
    "a batch of all sorts": [[3], [], [1, 2, 17], [1] * 8],
}


def in_float64(model, inputs):
    """transformers' model and inputs in float64; run the result inside `float64_inside`."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(model).double(), exact


def logit_errors(theirs, ours, inputs) -> tuple[float, float]:
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        peer, got = theirs(**inputs).logits[real], ours(**inputs).logits[real]
        with float64_inside():
            model, exact = in_float64(theirs, inputs)
            want = model(**exact).logits[real]
    return error_and_bound({"": got}, {"": peer}, {"": want})


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_logits_equal_transformers(rows):
    theirs, ours = vision_pair()
    error, bound = logit_errors(theirs, ours, batch(rows))
    assert error <= bound


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_gradients_equal_transformers(rows):
    assert_gradients_as_exact(rows)


def assert_gradients_as_exact(rows: list[list[int]], device: str = "cpu") -> None:
    """Loss and gradients of both models on the device, against transformers' in float64 on the CPU."""
    theirs, ours = vision_pair(scale=0.15)
    inputs = batch(rows)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with float64_inside():
        exact_loss, exact = _gradients(*in_float64(theirs, inputs))
    there = {name: value.to(device) for name, value in inputs.items()}
    got_loss, got = _gradients(ours.to(device), there)
    peer_loss, peer = _gradients(theirs.to(device), there)
    assert_as_exact(got_loss, peer_loss, exact_loss)
    for part in ("vision", "projector", "text") if "pixel_values" in inputs else ("text",):
        assert_as_exact(*({name: grad for name, grad in grads.items() if part_of(name) == part}
                          for grads in (got, peer, exact)))  # fmt: skip


def _gradients(model, inputs):
    """The loss and every gradient, on the CPU; 0 for weights that the loss does not reach."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
             for name, weight in model.named_parameters()}  # fmt: skip
    return loss.detach().cpu(), {name: grad.cpu() for name, grad in grads.items()}


MUTATIONS = {
    "rows before columns": ("patch_rotations", lambda config: _halves_swapped(config)),
    "other order of joined patches": ("pixel_shuffle", lambda x, side: _columns_first(x, side)),
    "other order within a patch": ("patches_of", lambda pixels, patch: _PATCHES(pixels.transpose(2, 3), patch)),
}
_ROTATIONS, _SHUFFLE, _PATCHES = encoder.patch_rotations, encoder.pixel_shuffle, encoder.patches_of


def _halves_swapped(config):
    turns = _ROTATIONS(config)
    return torch.cat(turns.chunk(2, -1)[::-1], -1)


def _columns_first(x, side):
    return _SHUFFLE(x, side).unflatten(-1, (side, side, -1)).transpose(2, 3).flatten(-3)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_of_meaning_is_far_outside_the_bound(name, monkeypatch):
    where, replacement = MUTATIONS[name]
    monkeypatch.setattr(encoder, where, replacement)
    error, bound = logit_errors(*vision_pair(), batch([[2]]))
    assert error > 20 * bound


def test_a_folder_goes_both_ways(tmp_path):
    theirs, ours = vision_pair()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = [json.loads((tmp_path / who / "config.json").read_text())["architectures"] for who in ("theirs", "ours")]
    assert names == [["Llama4ForConditionalGeneration"]] * 2
    tensors = [load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours")]
    torch.testing.assert_close(tensors[0], tensors[1], rtol=0, atol=0)
    for source, reader in (("theirs", NativeLlama4ForConditionalGeneration), ("ours", Llama4ForConditionalGeneration)):
        model, info = reader.from_pretrained(tmp_path / source, output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(dict(model.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_packed_documents_with_pictures_never_see_each_other():
    assert_packed_pictures_isolated()


def assert_packed_pictures_isolated(device: str = "cpu") -> None:
    """Logits of a packed row against those of its documents alone; another picture changes its own document only."""
    theirs, ours = vision_pair()
    tiles = [[1], [], [2, 3]]
    documents = [document(counts, 9, seed) for seed, counts in enumerate(tiles)]
    pictures = [pixels(sum(counts), seed) for seed, counts in enumerate(tiles)]

    def alone(model: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([
            model(ids[None].to(device), pixel_values=None if tile is None else tile.to(device, dtype)).logits[0]
            for ids, tile in zip(documents, pictures, strict=True)
        ])  # fmt: skip

    with torch.no_grad():
        with float64_inside():
            exact = alone(copy.deepcopy(theirs).double(), "cpu", torch.float64)
        peer = alone(theirs.to(device), device, torch.float32)
        positions = torch.cat([torch.arange(len(ids)) for ids in documents])[None].to(device)
        ids, tile = torch.cat(documents)[None].to(device), torch.cat([t for t in pictures if t is not None]).to(device)
        packed = ours.to(device)(ids, pixel_values=tile, position_ids=positions).logits[0]
        assert_as_exact(packed.cpu(), peer.cpu(), exact)
        changed = tile.clone()
        changed[0] += 1.0  # the picture of the first document
        others = slice(len(documents[0]), None)
        after = ours(ids, pixel_values=changed, position_ids=positions).logits[0]
        change = (after - packed).abs()
        assert change[others].max() < 1e-3 * change[: len(documents[0])].max()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradient_checkpointing_changes_nothing(mode):
    _, ours = vision_pair(scale=0.15)
    inputs = batch([[3], [1]])
    inputs["labels"] = inputs["input_ids"]
    ours.train()
    plain = gradients(ours, **inputs)
    ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
    assert all(layer.gradient_checkpointing for layer in ours.vision_model.model.layers)
    again = gradients(ours, **inputs)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_a_sampled_image_token_stays_a_token():
    theirs, ours = vision_pair()
    prompt, reply = document([1], 8, 0), torch.tensor([5, PATCH_ID, 7, PATCH_ID])
    ids = torch.cat([prompt, reply])[None]
    sampled = torch.arange(ids.shape[1])[None] >= len(prompt)
    places = image_places(ids, PATCH_ID, sampled)
    assert len(places) == FEATURES
    with pytest.raises(ValueError, match=r"1 tiles have 4 features, but 6 tokens stand for an image"):
        ours(ids, pixel_values=pixels(1))
    with torch.no_grad():
        got = ours(ids, pixel_values=pixels(1), image_places=places).logits[0]
        embeds = theirs.get_input_embeddings()(ids)
        features = theirs.multi_modal_projector(theirs.vision_model(pixels(1)).last_hidden_state.flatten(0, 1))
        embeds[0, places] = features
        torch.testing.assert_close(got, theirs(inputs_embeds=embeds).logits[0], rtol=1e-4, atol=1e-4)


def test_a_batch_without_pictures_gives_every_vision_weight_a_gradient_of_zero():
    """ZeRO divides gradients of the same weights among ranks, whatever pictures each rank has."""
    _, ours = vision_pair(scale=0.15)
    ours.train()
    inputs = batch([[]])
    gradients(ours, **inputs, labels=inputs["input_ids"])
    grads = {name: weight.grad for name, weight in ours.named_parameters() if part_of(name) != "text"}
    assert all(grad is not None and not grad.any() for grad in grads.values())


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "projector"], ["text"]])
def test_frozen_parts_have_no_gradient(frozen):
    _, ours = vision_pair(scale=0.15)
    ours.train()
    freeze(ours, frozen)
    inputs = batch([[2]])
    ours(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {part_of(name) for name, weight in ours.named_parameters() if weight.grad is not None}
    assert trained == {"vision", "projector", "text"} - set(frozen)


def test_replies_to_a_picture_equal_those_of_transformers():
    theirs, ours = vision_pair()
    inputs = batch([[2]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [PATCH_ID]}
    assert torch.equal(theirs.generate(**inputs, **arguments), ours.generate(**inputs, **arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, "vision_config.intermediate_size is 64; it must be hidden_size"),
        ({"vision_output_dim": 32}, "must be equal"),
        ({"image_size": 70}, "image_size 70 must be a multiple of patch_size 14 times 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        NativeLlama4ForConditionalGeneration(vision_config(**changes))


def test_tiles_of_another_size_are_an_error():
    _, ours = vision_pair()
    with pytest.raises(ValueError, match=r"tiles have shape \[3, 28, 28\]; this model takes \[3, 56, 56\]"):
        ours.image_features(torch.zeros(1, 3, 28, 28))


def test_features_of_a_tile():
    assert vision_sizes(vision_config().vision_config).features == FEATURES


@pytest.mark.parametrize(
    ("implementation", "model_class"),
    [("native", NativeLlama4ForConditionalGeneration), ("transformers", Llama4ForConditionalGeneration)],
)
def test_a_multimodal_folder_is_loaded_with_its_vision_part(tmp_path, implementation, model_class):
    theirs, _ = vision_pair()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, implementation, images=True)
    assert type(model) is model_class
    torch.testing.assert_close(dict(model.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_a_vision_tensor_that_is_missing_is_named(tmp_path):
    vision_pair()[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["vision_model.class_embedding"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing tensors: vision_model\.class_embedding"):
        load_model(tmp_path, images=True)
    assert load_model(tmp_path) is not None  # the text model is whole


def test_images_need_a_multimodal_model(tmp_path):
    folder = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "text")
    with pytest.raises(CheckpointError, match="a model of type llama4_text, which takes no images here"):
        load_model(folder, images=True)
