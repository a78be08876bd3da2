"""SFT on rows with pictures: what a batch holds, what is trained, what is refused, and the folder that is written."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from PIL import Image
from vision_folder import write_picture_rows
from vision_models import draw, save_vision_policy

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.images.section import STORE
from posttrain.data.images.tiles import tile_rule
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.model import load_model, load_tokenizer
from posttrain.model.load import load_policy
from posttrain.model.vision.parts import freeze, parameter_groups, part_of
from posttrain.sft import stage
from posttrain.sft.config import SftConfig
from posttrain.sft.isolation import packing_difference
from posttrain.sft.packing import IGNORED, blank_record, to_records
from posttrain.sft.trainer import RowTrainer
from posttrain.tune.pictures import stage_tiles
from posttrain.tune.steps import rows_and_blank


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_picture_rows(tmp_path_factory.mktemp("rows"), 12)


def make_config(model: Path, rows: Path, **changes: Any) -> SftConfig:
    settings = {
        "model": {"path": str(model), "dtype": "float32"}, "data": {"path": str(rows)}, "images": {},
        "batch_tokens": 256, "max_length": 128, "optimizer": {"learning_rate": 1e-3}, **changes,
    }  # fmt: skip
    return validate_config(SftConfig, settings, "test")


def make_context(folder: Path) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext("sft", folder, folder / "events.jsonl", 0)


def make_trainer(config: SftConfig, folder: Path) -> RowTrainer:
    """The trainer that the stage uses, without an engine and not started."""
    from trl.trainer.sft_config import SFTConfig

    context = make_context(folder)
    prepared = stage.prepare(config, context)
    tiles = stage_tiles(config, folder / STORE)
    assert config.images is not None
    return RowTrainer(
        model=load_policy(config.model, images=True),
        args=SFTConfig(**stage.trainer_arguments(config, folder)),
        train_dataset=rows_and_blank(
            to_records(prepared.examples, config.row_tokens, 0, images=True),
            blank_record(prepared.examples[0], packed=config.packing, images=True),
        ),
        processing_class=prepared.tokenizer,
        tiles=tiles,
    )


LAYOUTS = {"packed": {}, "padded": {"packing": False, "batch_tokens": None, "batch_size": 5}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_loss_is_that_of_transformers_on_each_row_alone(vision, rows, tmp_path, layout):
    """transformers' processor expands ids and cuts pictures itself; loss and bound are in float64 and fp32."""
    from transformers import AutoProcessor, Llama4ForConditionalGeneration

    config = make_config(vision, rows, **layout)
    trainer = make_trainer(config, tmp_path / "stage")
    processor: Any = AutoProcessor.from_pretrained(vision)
    theirs = Llama4ForConditionalGeneration.from_pretrained(vision, dtype=torch.float32).eval()
    reference = Llama4ForConditionalGeneration.from_pretrained(vision, dtype=torch.float64).eval()
    totals = {"theirs": 0.0, "exact": 0.0}
    count = 0
    for row in map(json.loads, rows.read_text().splitlines()):
        turns = [{**turn, "content": _parts(turn["content"])} for turn in row["messages"]]
        text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
        pictures = [Image.open(rows.parent / part["image"]) for part in turns[0]["content"] if part["type"] == "image"]
        inputs = processor(text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"]
        reply = processor.tokenizer(turns[-1]["content"][0]["text"] + "<|eot|>", add_special_tokens=False)["input_ids"]
        for name, model in (("theirs", theirs), ("exact", reference)):
            pixels = {"pixel_values": inputs["pixel_values"].to(model.dtype)} if pictures else {}
            with torch.no_grad(), float64_inside() if name == "exact" else contextlib.nullcontext():
                logps = model(input_ids=ids, **pixels).logits[0, :-1].log_softmax(-1)
            own = logps.gather(1, ids[0, 1:, None])[-len(reply) :, 0]
            totals[name] -= float(own.double().sum())
        count += len(reply)
    loss, trained = 0.0, 0
    trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        tokens = int((batch["labels"] != IGNORED).sum())
        with torch.no_grad():
            loss += float(trainer.held_out_sums(trainer.model, batch)["nll"])
        trained += tokens
    assert trained == count
    assert_as_exact(
        *(torch.tensor([value / count], dtype=torch.float64) for value in (loss, totals["theirs"], totals["exact"]))
    )


def _parts(content: Any) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_a_picture_that_two_rows_show_is_encoded_once(vision, tmp_path):
    """Once a batch, with the logits of two; and its tiles are cut once for all batches."""
    config = make_config(vision, _same_picture(tmp_path / "data"), packing=False, batch_tokens=None, batch_size=3)
    trainer = make_trainer(config, tmp_path / "stage")
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["pixel_values"]) == 1 + 3
    assert len(batch["shown_tiles"]) == 2 * 1 + 2 * 3
    model = trainer.model.eval()
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    twice = {**arguments, "pixel_values": batch["pixel_values"][batch["shown_tiles"]], "shown_tiles": None}
    with torch.no_grad():
        assert torch.allclose(model(**arguments).logits, model(**twice).logits, atol=1e-6)
        moved = {**arguments, "shown_tiles": batch["shown_tiles"].roll(1)}
        assert not torch.allclose(model(**arguments).logits, model(**moved).logits, atol=1e-2)
    again = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


def _same_picture(folder: Path) -> Path:
    folder.mkdir()
    one, wide = draw(folder / "one.png", 1), draw(folder / "wide.png", 2, (112, 56))
    turns = [
        [{"role": "user", "content": "<image><image>Sum: 1 + 2"}, {"role": "assistant", "content": "Answer: 3"}],
        [{"role": "user", "content": "<image>Sum: 1 + 3"}, {"role": "assistant", "content": "Answer: 4"}],
        [{"role": "user", "content": "Sum: 1<image> + 4"}, {"role": "assistant", "content": "Answer: 5"}],
    ]
    shown = [[one, wide], [wide], [one]]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": t, "images": i}) + "\n" for t, i in zip(turns, shown, strict=True)))
    return path


def test_packed_rows_with_pictures_are_isolated_by_the_native_model(vision, rows, tmp_path):
    config = make_config(vision, rows)
    context = make_context(tmp_path / "stage")
    examples = stage.prepare(config, context).examples
    tiles = stage_tiles(config, context.dir / STORE)
    model = load_policy(config.model, images=True)
    chosen = [item for item in examples if item.pictures][:2] + [item for item in examples if not item.pictures][:1]
    assert packing_difference(model, chosen, tiles) < 1e-5


BAD = {
    "a text model": ({}, ["images:", "model_type is 'llama4_text', which takes no images"]),
    "no section": ({"images": None}, ["row 2", "has an image", "set images: {} for a multimodal model"]),
    "too many pictures": ({"images": {"max_images": 2}}, ["3 pictures; at most 2"]),
    "no root": ({"images": {"root": "none"}}, ["images.root: got 'none': no such folder"]),
    "another root": ({"images": {"root": "."}}, ["is no file in"]),
    "transformers": ({"model.implementation": "transformers"}, ["images with model.implementation transformers"]),
    "nothing to train": ({"images": {"freeze": ["vision", "projector", "text"]}}, ["which is the whole model"]),
    "frozen with a rate": (
        {"images": {"freeze": ["vision"], "learning_rates": {"vision": 1e-3}}}, ["learning_rates: got vision"],
    ),
    "dropout": ({"lora": {"dropout": 0.1}}, ["lora.dropout: got 0.1 with images", "set dropout: 0.0"]),
    "an unknown part": ({"images": {"freeze": ["eyes"]}}, ["images.freeze.0", "eyes"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_heavy(name, vision, policy, rows, tmp_path, capsys):
    """From the command line, with `--dry-run`, which starts nothing: exit code 2 and one message."""
    import yaml

    from posttrain.cli.main import main

    changes, words = BAD[name]
    settings: dict[str, Any] = {
        "model": {"path": str(policy if name == "a text model" else vision), "dtype": "float32"},
        "data": {"path": str(rows)}, "images": {}, "max_length": 128,
    }  # fmt: skip
    for key, value in changes.items():
        if "." in key:
            settings["model"]["implementation"] = value
        else:
            settings[key] = value
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sft", str(tmp_path / "sft.yaml"), "--dry-run"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("frozen", "adapted"), [([], {"vision", "text"}), (["vision"], {"text"}), (["text"], {"vision"})]
)
def test_adapters_are_put_on_the_parts_that_are_trained(vision, rows, frozen, adapted):
    from peft import get_peft_model

    from posttrain.tune.run import _adapters

    config = make_config(vision, rows, images={"freeze": frozen}, lora={"rank": 2})
    model = load_policy(config.model, images=True)
    trained = get_peft_model(model, _adapters(model, config)).named_parameters()
    assert {part_of(name) for name, weight in trained if weight.requires_grad} == adapted


def test_a_rate_for_a_part_without_trained_weights_is_an_error(vision, rows):
    model = load_policy(make_config(vision, rows).model, images=True)
    freeze(model, ["projector"])
    with pytest.raises(ConfigError, match=r"images\.learning_rates: got projector: no weight of it is trained"):
        parameter_groups(model, {"projector": 1e-3})


def test_a_processor_that_does_not_fit_the_model_is_named(vision, rows, tmp_path):
    other = shutil.copytree(vision, tmp_path / "model")
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"height": 84, "width": 84}
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="the processor has image_size 84, and the model 56"):
        stage.prepare(make_config(other, rows), make_context(tmp_path / "stage"))


def test_a_typed_image_token_is_text_or_refused(vision, tmp_path):
    """It stands for no picture; where special tokens in text are refused, rows with pictures are looked through too."""
    draw(tmp_path / "a.png", 3)
    turns = [{"role": "user", "content": "<image>Sum: <|patch|><|image|>"}, {"role": "assistant", "content": "no"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": ["a.png"]}))
    (example,) = stage.prepare(make_config(vision, tmp_path / "rows.jsonl"), make_context(tmp_path / "s")).examples
    patch = load_tokenizer(vision).convert_tokens_to_ids("<|patch|>")
    assert list(example.ids).count(patch) == 4
    assert len(example.pictures) == 1
    refusing = {"path": str(tmp_path / "rows.jsonl"), "special_tokens_in_text": "refuse"}
    with pytest.raises(DataError, match=r"its text holds the special token '<\|patch\|>'"):
        stage.prepare(make_config(vision, tmp_path, data=refusing), make_context(tmp_path / "t"))


def test_another_picture_of_the_same_name_runs_the_stage_anew(vision, rows, tmp_path):
    from posttrain.pipeline.graph import load_pipeline
    from posttrain.pipeline.hashing import input_hash

    folder = shutil.copytree(rows.parent, tmp_path / "rows")
    settings = make_config(vision, folder / "rows.jsonl").model_dump(mode="json")
    given = {"name": "p", "stages": [{"name": "sft", "kind": "sft", "config": settings}]}

    def now() -> str:
        pipeline = load_pipeline(given)
        return input_hash(pipeline.nodes["sft"], pipeline, {})

    first = now()
    assert now() == first
    draw(folder / "3_1.png", 77)
    assert now() != first


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, images=True).state_dict())


PARTS = {"images": {"freeze": ["vision"], "learning_rates": {"projector": 4e-3}}, "held_out": {"rows": 3}}


@pytest.mark.slow
def test_the_stage_trains_the_parts_that_it_should_and_others_load_what_it_writes(ranks, vision, rows, tmp_path):
    """One rank. Adam's first step moves a weight by the learning rate, so the rate of a part shows in its weights."""
    from transformers import AutoProcessor, Llama4ForConditionalGeneration

    context = make_context(tmp_path / "run")
    report = stage.run(make_config(vision, rows, batch_tokens=4096, **PARTS), context)
    assert report["engine"] == "DeepSpeedEngine"
    assert report["steps"] == 1
    assert report["pictures"] == 18
    before, after = weights_of(vision), weights_of(tmp_path / "run/model")
    moved: dict[str, float] = {}
    for name, weight in before.items():
        part = part_of(name)
        assert part is not None
        moved[part] = max(moved.get(part, 0.0), float((after[name] - weight).abs().max()))
    assert moved["vision"] == 0
    assert moved["text"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["projector"] == pytest.approx(4e-3, rel=1e-2)
    theirs = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in after.items())
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "run/model")
    with Image.open(rows.parent / "3_0.png") as picture:
        made = processor(text="<|image|>", images=[picture], add_special_tokens=False, return_tensors="pt")
    rule = tile_rule(tmp_path / "run/model", load_tokenizer(tmp_path / "run/model"))
    assert made["input_ids"][0].tolist() == rule.ids(*picture.size)
