"""The filter on rows with pictures: what its judge is shown, and what other stages read."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import MODEL, chat, serving
from test_judge_endpoint import GOOD
from vision_folder import write_picture_rows
from vision_models import draw, save_vision_policy

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.duplicates import Duplicate, DuplicateIndex
from posttrain.data.images.render import pictures_of
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.images.tiles import tile_rule
from posttrain.data.rows import load_rows
from posttrain.errors import CheckpointError, DataError
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.stage import run
from posttrain.judging.backend import prepare_judge
from posttrain.judging.cache import VerdictCache
from posttrain.judging.prompts import judge_prompts, label_token_ids
from posttrain.judging.verdicts import Verdict
from posttrain.model import load_model, load_tokenizer
from posttrain.model.vision.tiling import PictureTiles
from posttrain.records import Media
from posttrain.sft import stage as sft
from posttrain.sft.config import SftConfig

TEMPLATE = "Rate: {prompt} {response}"


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_picture_rows(tmp_path_factory.mktemp("rows"), 8)


def make_config(rows: Path, judge: Any, **changes: Any) -> FilterConfig:
    settings = {"judge": judge, "data": {"path": str(rows)}, "template": TEMPLATE, "images": {}, **changes}
    return validate_config(FilterConfig, settings, "test")


def make_context(folder: Path) -> StageContext:
    folder.mkdir(exist_ok=True)
    return StageContext("filter", folder, folder / "events.jsonl", seed=3)


def test_an_endpoint_is_sent_the_pictures_and_other_stages_read_the_kept_rows(vision, rows, tmp_path):
    """Each row's pictures in order, before the question; then SFT reads pictures of the same content."""
    with serving(lambda body: chat("hard", GOOD)) as server:
        judge = {"endpoint": {"base_url": server.url, "model": MODEL}}
        outputs = run(make_config(rows, judge), make_context(tmp_path / "filter"))
        asked = [body["messages"][0]["content"] for body in server.questions()]
    store = ImageStore(tmp_path / "again")
    given = {row.id: row for row in load_rows(rows, kind="supervised", images=ImageReader(store))}
    shown = []
    for content in asked:
        *parts, text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        pictures = [base64.b64decode(part["image_url"]["url"].partition("base64,")[2]) for part in parts]
        assert [part["image_url"]["url"][:15] for part in parts] == ["data:image/png;"] * len(parts)
        assert text["text"].startswith("Rate: " + "".join(f"[picture {n}]" for n in range(1, len(parts) + 1)))
        shown.append((text["text"], pictures))
    expected = [[store.encoded(key) for key in pictures_of(row.messages)] for row in given.values()]
    assert sorted(pictures for _, pictures in shown) == sorted(expected)
    kept = {row.id: row for row in load_rows(outputs["kept"], kind="supervised", images=ImageReader(store))}
    assert len(kept) == 4
    assert all(row.messages == given[name].messages for name, row in kept.items())
    settings = {"model": {"path": str(vision), "dtype": "float32"}, "data": {"path": outputs["kept"]}, "images": {},
                "batch_tokens": 256, "max_length": 128}  # fmt: skip
    prepared = sft.prepare(validate_config(SftConfig, settings, "test"), make_context(tmp_path / "sft"))
    assert sum(len(example.pictures) for example in prepared.examples) == sum(
        len(pictures_of(row.messages)) for row in kept.values()
    )


def test_another_picture_of_the_same_size_is_another_question(vision, tmp_path):
    """Its tokens are the same, and so is its text."""
    turns = [{"role": "user", "content": "<image>Sum: 1"}, {"role": "assistant", "content": "1"}]
    lines = [{"id": name, "messages": turns, "images": [draw(tmp_path / f"{name}.png", ord(name))]} for name in "abc"]
    lines.append({"id": "d", "messages": turns, "images": ["a.png"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(tmp_path / "rows.jsonl", {"path": str(vision), "dtype": "float32"})
    store = ImageStore(tmp_path / "pictures")
    judge = prepare_judge(config, store)
    given = load_rows(config.data, kind="supervised", images=ImageReader(store))
    a, b, c, d = map(judge.prompts.render, given)
    assert a.token_ids == b.token_ids == c.token_ids
    assert list(a.token_ids).count(load_tokenizer(vision).convert_tokens_to_ids("<|patch|>")) == 4
    with VerdictCache(tmp_path / "verdicts.sqlite", judge) as cache:
        cache.add(a, Verdict("hard", 1.0, {"hard": 1.0}))
        assert [cache.get(item) is not None for item in (a, b, c, d)] == [True, False, False, True]


@pytest.mark.parametrize("near", [None, 0.5])
@pytest.mark.parametrize("taken", [True, False])
def test_the_same_question_about_another_picture_is_no_duplicate(tmp_path, near, taken):
    """Whether the pictures were taken into a store, or the rows only name them."""
    turns = [{"role": "user", "content": "<image>" + "how many boxes are in the picture " * 4},
             {"role": "assistant", "content": "1"}]  # fmt: skip
    names = [draw(tmp_path / f"{n}.png", n) for n in (1, 2)]
    lines = [{"id": f"r{n}", "messages": turns, "images": [names[n % 2]]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = ImageReader(ImageStore(tmp_path / "pictures")) if taken else None
    with DuplicateIndex(near) as index:
        found = [index.find(row) for row in load_rows(tmp_path / "rows.jsonl", kind="supervised", images=reader)]
    assert found == [None, None, Duplicate("r2", "r0", 1.0)]


def test_rows_with_pictures_need_the_section_and_a_judge_that_takes_them(policy, vision, rows, tmp_path):
    judge = {"path": str(vision), "dtype": "float32"}
    with pytest.raises(DataError, match=r"stage filter works on text only; set images: \{\} for a multimodal model"):
        run(make_config(rows, judge, images=None), make_context(tmp_path / "text"))
    config = make_config(rows, {"path": str(policy), "dtype": "float32"})
    with pytest.raises(CheckpointError, match="which takes no images"):
        judge_prompts(config, ImageStore(tmp_path / "pictures"))


@pytest.mark.slow
def test_verdicts_are_the_models_own_distribution_with_the_pictures(ray_session, vision, rows, tmp_path):
    engine = {"max_model_len": 256, "kv_cache_gib": 0.1, "max_num_seqs": 16, "stream_interval": 2}
    config = make_config(rows, {"path": str(vision), "dtype": "float32"}, engine=engine,
                         resources={"judge": {"cpus": 0.5}})  # fmt: skip
    outputs = run(config, make_context(tmp_path / "filter"))
    tokenizer, model = load_tokenizer(vision), load_model(vision, images=True)
    store = ImageStore(tmp_path / "pictures")
    prompts, tiles = judge_prompts(config, store), PictureTiles(store, vision, tile_rule(vision, tokenizer))
    choices = list(label_token_ids(tokenizer, config.labels))
    for name in ("kept", "dropped"):
        for row in load_rows(outputs[name], kind="supervised", images=ImageReader(store)):
            question = prompts.render(row)
            pictures = tiles.inputs(Media(reference).key for reference in question.pictures)
            with torch.no_grad():
                logits_V = model(torch.tensor([question.token_ids]), **pictures).logits[0, -1]
            expected = logits_V[choices].softmax(-1).tolist()
            found = list(row.fields["difficulty"]["probabilities"].values())
            assert found == pytest.approx(expected, abs=1e-4)
            assert bool(pictures) == bool(question.pictures)
