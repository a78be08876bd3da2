"""DPO on pairs with pictures in their prompts: log-probabilities of each row alone, each picture once a batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from trl.trainer.dpo_config import DPOConfig
from vision_models import draw, save_vision_policy

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.dpo import stage
from posttrain.dpo.config import DpoConfig
from posttrain.dpo.examples import blank_record, to_record
from posttrain.dpo.trainer import PairTrainer
from posttrain.errors import DataError
from posttrain.model.load import load_policy
from posttrain.tune.pictures import stage_tiles
from posttrain.tune.steps import rows_and_blank


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Four pairs with 0, 1, 2 and 1 pictures; the last has the same text as the second, and another picture."""
    place = tmp_path_factory.mktemp("pairs")
    a, b, wide = (draw(place / f"{n}.png", n, size) for n, size in enumerate([(56, 56), (56, 56), (112, 56)], 1))
    rows = [
        {"id": str(n), "prompt": "<image>" * len(shown) + "Sum: 1 + 2", "images": shown,
         "chosen": "Answer: 3" + "." * n, "rejected": "no"}
        for n, shown in enumerate([[], [a], [a, wide], [b]])
    ]  # fmt: skip
    path = place / "pairs.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v != []}) + "\n" for row in rows))
    return path


def make_config(folder: Path, pairs: Path, **changes: Any) -> DpoConfig:
    settings = {"model": {"path": str(folder), "dtype": "float32"}, "pairs": {"path": str(pairs)}, "images": {},
                "max_length": 128, "batch_size": 4}  # fmt: skip
    return validate_config(DpoConfig, {**settings, **changes}, "test")


def alone(theirs: Any, item: Any, tiles: Any) -> list[torch.Tensor]:
    """The summed log-probabilities of the two replies, by transformers' model."""
    found = []
    pictures = tiles.inputs(item.pictures)
    pixels = {"pixel_values": pictures["pixel_values"].to(theirs.dtype)} if pictures else {}
    for reply in (item.chosen_ids, item.rejected_ids):
        ids = torch.tensor([item.prompt_ids + reply])
        logps = theirs(input_ids=ids, **pixels).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(logps[-len(reply) :].double().sum())
    return found


def test_a_batch_has_each_picture_once_and_the_log_probabilities_of_its_rows(folder, pairs, tmp_path):
    """Under the reference too, whose pass TRL makes before the first step."""
    from transformers import Llama4ForConditionalGeneration

    config = make_config(folder, pairs)
    context = StageContext("dpo", tmp_path, tmp_path / "events.jsonl", 0)
    prepared = stage.prepare(config, 0, context)
    tiles = stage_tiles(config, stage.picture_store(config, tmp_path))
    assert tiles is not None
    rows = [to_record(item, images=True) for item in prepared.ids]
    trainer = PairTrainer(
        model=load_policy(config.model, images=True),
        args=DPOConfig(**stage.trainer_arguments(config, tmp_path)),
        train_dataset=rows_and_blank(rows, blank_record(prepared.ids[0], images=True)),
        processing_class=prepared.tokenizer,
        tiles=tiles,
        **stage.trainer_options(config),
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    assert len(batch["pixel_values"]) == 1 + 3 + 1
    assert len(batch["shown_tiles"]) == 2 * (1 + (1 + 3) + 1)
    with torch.no_grad():
        found, _ = trainer._pairs(trainer.model.eval(), batch)
        models = [
            Llama4ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.float64)
        ]
        peer = torch.stack([value for item in prepared.ids for value in alone(models[0], item, tiles)])
        with float64_inside():
            exact = torch.stack([value for item in prepared.ids for value in alone(models[1], item, tiles)])
        text = trainer.data_collator([trainer.train_dataset[0]])
        shared, _ = trainer._pairs(trainer.model, text)  # a pair without a picture, whose prompt is run once
    assert_as_exact(torch.stack([found.chosen_logprobs_P, found.rejected_logprobs_P], 1).flatten(), peer, exact)
    assert "pixel_values" not in text
    assert trainer.shares_prompts
    assert_as_exact(torch.cat([shared.chosen_logprobs_P, shared.rejected_logprobs_P]), peer[:2], exact[:2])
    reference = torch.tensor(
        [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in trainer.train_dataset][:-1]
    )
    assert_as_exact(reference.flatten(), peer, exact)


def test_pairs_of_a_text_stage_and_lost_pictures_are_errors(folder, pairs, tmp_path):
    with pytest.raises(DataError, match=r"stage dpo works on text only; set images: \{\} for a multimodal model"):
        stage.prepare(make_config(folder, pairs, images=None), 0)
    (pairs.parent / "lost.jsonl").write_text(pairs.read_text().replace("1.png", "9.png"))
    with pytest.raises(DataError, match=r"row 2: images\[0\]: the picture '9.png' is no file"):
        stage.prepare(make_config(folder, pairs.parent / "lost.jsonl"), 0)
