"""The puzzles about pictures: what is drawn, what the model reads, and a whole reduced run."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_records import one_turn
from test_base import context, weights

from posttrain.base.config import ModelSizes, SetSizes, StageConfig, TextConfig
from posttrain.base.corpus import JUDGE_TEMPLATE, RATINGS
from posttrain.base.courses import COURSES
from posttrain.base.pictures.drawing import CELL, CELLS, COLOURS, NAMES, SIDE, as_png
from posttrain.base.pictures.model import tiles_of
from posttrain.base.pictures.puzzles import PICTURES
from posttrain.base.pictures.text import PictureCorpus, PictureRenderer
from posttrain.base.problem import LEVELS
from posttrain.base.sets import draw_sets, pictures_of_problem, write_sets
from posttrain.base.stage import run
from posttrain.base.tasks import draw_distinct, solve
from posttrain.config.base import validate_config
from posttrain.config.data import DataConfig
from posttrain.data.images.modality import modality_of
from posttrain.data.images.render import pictures_of, samples_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.images.tiles import tile_rule
from posttrain.data.rows import load_rows
from posttrain.data.samples import render_conversation
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.judging.prompts import judge_prompts
from posttrain.model.vision.tiling import PictureTiles
from posttrain.records import ImagePart, Message, Row, TextPart
from posttrain.rewards.puzzles import puzzles

TEXT = TextConfig(plain_share=0)
SETS = SetSizes(sft=60, prompts=40, heldout=20, tune=20)
SMALL = StageConfig(
    puzzles="pictures",
    steps=4,
    batch_tokens=768,
    processes=2,
    warmup_steps=2,
    model=ModelSizes(hidden=32, layers=4, heads=1, head_dim=32, ffn=48, expert_ffn=32, experts=4),
    sets=SETS,
    text=TEXT,
)


@pytest.fixture(scope="module")
def tokenizer():
    return COURSES["pictures"].build_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """The model's folder before any training."""
    place = tmp_path_factory.mktemp("model") / "model"
    COURSES["pictures"].build_model(SMALL.model, tokenizer, 0.0, seed=0).save_pretrained(place)
    COURSES["pictures"].save(tokenizer, place)
    return place


def drawn(count=350, seed=0):
    return draw_distinct(count, random.Random(seed), puzzles=PICTURES)


def reward(problem, text):
    row = Row("r", "c", (), problem.answer, {"family": problem.family})
    return puzzles(one_turn("r", "g", 0, (), (), text, (), (), "stop"), row).value


# ------------------------------------------------------------------ an eye that looks at pixels alone


def coloured(picture, colour):
    """Where a picture has this colour, bool [SIDE, SIDE]."""
    return (picture == COLOURS[colour]).all(-1)


def cells_of(mask):
    """The cells that are wholly coloured; none is so in part."""
    found = []
    for cell, name in enumerate(NAMES):
        row, column = divmod(cell, CELLS)
        area = mask[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        assert area.all() == area.any()
        if area.any():
            found.append(name)
    return found


def seen(problem):
    """The answer by the pixels and the text of the prompt; None for puzzles whose answer is not looked up so."""
    pictures, words = pictures_of_problem(problem, PICTURES), problem.prompt.split()
    if words[0] == "Count":
        return str(len(cells_of(coloured(pictures[0], words[1]))))
    if words[0] == "Find":
        return " ".join(cells_of(coloured(pictures[0], words[1])))
    if words[-1] == "bar":
        heights = {colour: coloured(pictures[0], colour).any(1).sum() for colour in COLOURS}
        choose = max if words[0] == "Highest" else min
        return choose((height, colour) for colour, height in heights.items() if height)[1]
    if problem.family == "differ":
        colours = [next(colour for colour in COLOURS if coloured(picture, colour).any()) for picture in pictures]
        ((odd, times), *_) = sorted(Counter(colours).items(), key=lambda item: item[1])
        assert times == 1
        assert odd != colours[0]
        return str(colours.index(odd) + 1)
    return None


def test_the_answer_is_what_the_pictures_show():
    looked = Counter()
    for problem in drawn(700):
        if (answer := seen(problem)) is not None:
            assert answer == problem.answer, problem
            looked[problem.family] += 1
    assert set(looked) == {"count", "find", "bars", "differ"}
    assert min(looked.values()) == 100


def test_each_digit_is_drawn_in_its_own_way():
    one_digit = [problem for problem in drawn(2000) if problem.family == "digits" and problem.level == 1]
    shapes = {}
    for problem in one_digit:
        (picture,) = pictures_of_problem(problem, PICTURES)
        black = (picture == 0).all(-1)
        rows, columns = np.nonzero(black)
        mask = black[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        shapes.setdefault(problem.answer, set()).add(mask.tobytes())
    assert len(shapes) == 9
    assert len(set().union(*shapes.values())) == 9


def test_every_family_and_level_is_drawn_and_up_to_eight_pictures_are_shown():
    problems = drawn(700)
    assert {(problem.family, problem.level) for problem in problems} == {
        (family, level) for family in PICTURES.families for level in LEVELS
    }
    shown = [len(pictures_of_problem(problem, PICTURES)) for problem in problems]
    assert set(shown) == {0, 1, 3, 4, 5, 6, 7, 8}


def test_right_solutions_are_rewarded_and_flawed_ones_mostly_not():
    rng, problems = random.Random(3), drawn()
    for worked in (True, False):
        assert all(reward(one, solve(one, rng, worked, puzzles=PICTURES)) == 1.0 for one in problems)
        flawed = [reward(one, solve(one, rng, worked, flaw=1.0, puzzles=PICTURES)) for one in problems]
        assert sum(flawed) < 0.5 * len(flawed)


# ------------------------------------------------------------------ what the model is trained on


def row_of(problem, reply, store):
    keys = [store.add(as_png(picture)).key for picture in pictures_of_problem(problem, PICTURES)]
    content = (TextPart(problem.prompt),) if keys else problem.prompt
    for number in range(len(keys), 0, -1):
        label = [TextPart(f" {number}")] if len(keys) > 1 else []
        content = (*label, ImagePart(keys[number - 1]), *content)
    return (Message("user", content), Message("assistant", reply))


def test_the_fast_rendering_and_tiles_are_those_of_the_stages(tokenizer, folder, tmp_path):
    store, rng = ImageStore(tmp_path / "pictures"), random.Random(0)
    rule, renderer = tile_rule(folder, tokenizer), PictureRenderer(tokenizer)
    tiles = PictureTiles(store, folder, rule)
    for problem in drawn(70):
        reply = solve(problem, rng, rng.random() < 0.5, flaw=0.5, puzzles=PICTURES)
        document, messages = renderer.document(problem, reply), row_of(problem, reply, store)
        if keys := pictures_of(messages):
            (sample,) = samples_with_pictures(tokenizer, messages, store, rule=rule)
            ids, mask = sample.ids, sample.mask
            made = torch.cat([tiles.of(key) for key in keys]).float()
            assert torch.equal(made, tiles_of(list(document.pictures)))
        else:
            ids, mask = render_conversation(tokenizer, messages)
        assert (list(document.ids), document.replies) == (list(ids), ((list(mask).index(1), len(ids)),))


def test_ratings_are_asked_in_the_words_of_the_filter(tokenizer, folder, tmp_path):
    from posttrain.filtering.config import FilterConfig

    data = {"judge": {"path": str(folder)}, "data": {"path": "rows.jsonl"}, "images": {}, "template": JUDGE_TEMPLATE}
    store = ImageStore(tmp_path / "pictures")
    prompts = judge_prompts(
        validate_config(FilterConfig, {**data, "labels": ["easy", "medium", "hard"]}, "test"), store
    )
    for problem in drawn(35):
        document = PictureRenderer(tokenizer).document(problem, RATINGS[problem.level], rates=True)
        question = prompts.render(Row("r", "c", row_of(problem, "Answer: 1", store), None, {}))
        assert list(question.token_ids) == list(document.ids[: document.replies[0][0]])


def test_late_text_mostly_answers_at_a_glance(tokenizer):
    corpus = PictureCorpus(tokenizer, TextConfig(plain_share=0, rate_share=0), frozenset(), seed="x")
    early, late = (
        sum("Steps:" in tokenizer.decode(corpus.document(late).ids) for _ in range(400)) / 400 for late in (False, True)
    )
    assert early > 0.8
    assert late < 0.45


def test_sets_share_no_picture_and_rows_are_those_of_a_stage(tmp_path):
    sets = draw_sets(0, SETS, PICTURES)
    paths = write_sets(sets, tmp_path, 0, puzzles=PICTURES, with_systems=False)
    store, shown = ImageStore(tmp_path / "store"), {}
    for name, path in paths.items():
        kind = "supervised" if name == "sft" else "prompt"
        rows = load_rows(DataConfig(path=str(path)), kind=kind, stage="sft", images=ImageReader(store))
        assert len(rows) == getattr(SETS, name)
        assert {modality_of(row) for row in rows} == {"text", "image", "multi-image"}
        single = [pictures_of(row.messages)[0] for row in rows if modality_of(row) == "image"]
        shown[name] = set(single)
        assert all(store[key].width == store[key].height == SIDE for key in single)
    assert len(set().union(*shown.values())) == sum(map(len, shown.values()))
    corpus = PictureCorpus(COURSES["pictures"].build_tokenizer(), TEXT, sets.keys(), seed="x")
    trained = {store.add(as_png(picture)).key for _ in range(500) for picture in corpus.document(False).pictures}
    assert not trained & set().union(*shown.values())


def test_keys_that_have_no_effect_are_refused():
    with pytest.raises(ConfigError, match=r"pictures has no plain documents; set text.plain_share \(got 0.6\) to 0"):
        validate_config(StageConfig, {"puzzles": "pictures"}, "base")


# ------------------------------------------------------------------ training


@pytest.mark.slow
def test_training_moves_every_part_and_transformers_loads_the_folder(tmp_path, monkeypatch, tokenizer):
    from transformers import Llama4ForConditionalGeneration

    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    stage = context(tmp_path, "one")
    run(SMALL, stage)
    first = COURSES["pictures"].build_model(SMALL.model, tokenizer, 0.0, seed=0).state_dict()
    trained = weights(stage.dir)
    still = [name for name, tensor in trained.items() if torch.equal(tensor, first[name])]
    assert still == []
    model = Llama4ForConditionalGeneration.from_pretrained(stage.dir / "model")
    assert model.config.architectures == ["Llama4ForConditionalGeneration"]
    assert json.loads((stage.dir / "model" / "processor_config.json").read_text())["patch_size"] == CELL // 2
    assert len(list(read_jsonl(stage.dir / "metrics.jsonl"))) == 1
