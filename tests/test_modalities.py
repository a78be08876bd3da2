"""Quotas and beliefs by modality: text, one picture, several."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
from PIL import Image
from pydantic import ValidationError
from rollout_records import one_turn

from posttrain.config.images import Modality
from posttrain.config.rewards import SystemsConfig
from posttrain.data.images.references import load_image
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.rows import store_rows
from posttrain.data.strata import sampled_places
from posttrain.errors import ConfigError
from posttrain.filtering.selection import select
from posttrain.records import DrawnPrompt, ImagePart, Message, Prompt, Row, TextPart, VersionSpan
from posttrain.rl.loop.places import BatchPlaces
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.prompts.beliefs import Beliefs
from posttrain.rl.prompts.config import ModalityCurriculumConfig, PromptsConfig
from posttrain.rl.prompts.lengths import plain_prompts
from posttrain.rl.prompts.profile import profiled_places
from posttrain.rl.prompts.progress import Progress
from posttrain.rl.prompts.quotas import mixture_shares, moved_shares, places, scattered
from posttrain.rl.prompts.selection import Selection
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Group, ScoredGroup


def row_of(name: str, capability: str, pictures: int) -> Row:
    text = TextPart(name)
    content = (*(ImagePart(f"{n:032x}") for n in range(pictures)), text) if pictures else name
    return Row(name, capability, (Message("user", content),), "1")


# 12 of text (8 math, 4 chat), 6 with a picture (math), 2 with three (chat)
ROWS = [
    *(row_of(f"t{n}", "math" if n < 8 else "chat", 0) for n in range(12)),
    *(row_of(f"i{n}", "math", 1) for n in range(6)),
    *(row_of(f"m{n}", "chat", 3) for n in range(2)),
]
SHARES: dict[Modality, float] = {"text": 2.0, "image": 1.0, "multi-image": 1.0}


def test_modalities_have_their_share_and_capabilities_theirs_within():
    assert mixture_shares(ROWS, {}, modalities=SHARES) == pytest.approx(
        {"chat, multi-image": 1 / 4, "chat, text": 1 / 6, "math, image": 1 / 4, "math, text": 1 / 3}
    )
    assert mixture_shares(ROWS, {"math": 1.0, "chat": 3.0}, modalities={"text": 1.0, "image": 3.0}) == pytest.approx(
        {"chat, text": 3 / 16, "math, image": 3 / 4, "math, text": 1 / 16}
    )
    assert mixture_shares(ROWS, {}, modalities={}) == mixture_shares(ROWS, {})


def test_a_modality_without_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"multi-image: no prompt of a capability in mixture has this modality"):
        mixture_shares(ROWS, {"math": 1.0}, "prompt", modalities=SHARES)
    with pytest.raises(ConfigError, match=r"image: no prompt .*; there are: text 12"):
        mixture_shares(ROWS[:12], {}, "prompt", modalities=SHARES)


@pytest.mark.parametrize("by_beliefs", [True, False])
def test_prompts_are_drawn_by_the_quotas_of_modalities(by_beliefs):
    beliefs = Beliefs(ROWS, 20.0)
    selection = Selection(beliefs, group_size=4, seed=1, modalities=SHARES) if by_beliefs else None
    source = PromptSource(
        ROWS, SystemsConfig(), lambda row, messages: [1, 2], seed=1, selection=selection, modalities=SHARES
    )
    quotas = islice(places(mixture_shares(ROWS, {}, modalities=SHARES)), 48)
    drawn = Counter(source.draw(quota, order).row.id[0] for order, quota in enumerate(quotas))
    assert drawn == {"t": 24, "i": 12, "m": 12}


# What divides rows fairly: each is given rows of "math", 40 of text and 8 with a picture, and takes 12 of them.
DIVIDED = {
    "the filter's selection": lambda rows: select(rows, [float(row.id[0] == "t") for row in rows], 0.25)[0],
    "an evaluation's sample": lambda rows: [rows[place] for place in sampled_places(rows, 12)],
    "a profile's sample": lambda rows: [rows[place] for place in profiled_places(rows, 12, seed=3)],
}


@pytest.mark.parametrize("name", DIVIDED)
def test_rows_with_pictures_keep_their_share_of_a_capability(name):
    rows = [*(row_of(f"t{n}", "math", 0) for n in range(40)), *(row_of(f"i{n}", "math", 1) for n in range(8))]
    taken = Counter(row.id[0] for row in DIVIDED[name](rows))
    assert taken == {"t": 10, "i": 2}


def expected(rows: list[Row], name: str) -> float:
    """The expected pass rate of an unseen prompt, after text was found easy and single pictures hard."""
    beliefs = Beliefs(rows, 20.0)
    for n in range(7):
        beliefs.observe(f"t{n}", 8, 0, version=0)
    for n in range(5):
        beliefs.observe(f"i{n}", 1, 7, version=0)
    beliefs.fit()
    a, b = beliefs.prior(name)
    return a / (a + b)


def test_an_unseen_prompt_is_expected_to_be_like_those_of_its_modality():
    assert expected(ROWS, "i5") < expected(ROWS, "t7") - 0.1
    as_text = [row_of(row.id, row.capability, 0) for row in ROWS]
    assert expected(as_text, "i5") == expected(as_text, "t7")  # the same rows of one modality are told apart by nothing


def test_prompts_on_disk_refer_to_their_pictures(tmp_path: Path):
    for width in (8, 16):
        Image.new("RGB", (width, 8), (width, 0, 0)).save(tmp_path / f"{width}.png")
    asked = [("t", []), ("i", ["8.png"]), ("m", ["16.png", "8.png"])]
    lines = [
        {"id": name, "images": images, "messages": [{"role": "user", "content": "<image>" * len(images) + "How wide?"}]}
        for name, images in asked
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = ImageStore(tmp_path / "pictures")
    rows = store_rows(tmp_path / "rows.jsonl", kind="prompt", stage="rl", images=ImageReader(store))
    prompts = plain_prompts(rows, lambda row, messages: [1, 2], store)
    widths = [[load_image(reference).width for reference in item.prompt.pictures] for item in prompts]
    assert widths == [[], [8], [16, 8]]
    assert len(store) == 2  # the picture that two rows show is kept once
    shares = mixture_shares(rows, {}, modalities=SHARES)
    assert list(shares) == ["general, image", "general, multi-image", "general, text"]
    source = PromptSource(rows, SystemsConfig(), lambda row, messages: [1], seed=0, store=store, modalities=SHARES)
    drawn = source.draw("general, multi-image", 0)
    assert drawn.row.id == "m"
    assert [load_image(item).width for item in drawn.prompt.pictures] == [16, 8]


# ------------------------------------------------------------------ the mixture that moves

CURRICULUM = ModalityCurriculumConfig(floor=0.4, half_life=4.0)


def moved_by(rates: dict[str, tuple[float, float]], steps: int = 12) -> Progress:
    """Shares after some steps in which the pass rate of each modality was another than the beliefs expected.

    rates: (expected, found) of each modality.
    """
    progress = Progress(SHARES, CURRICULUM)
    for step in range(steps):
        for name, (expected, found) in rates.items():
            for _ in range(8):
                passes = round(found * 8)
                progress.observe(cast(Modality, name), passes, 8 - passes, expected=expected)
        progress.advance(step + 1)
    return progress


def test_more_of_what_improves_or_is_forgotten_and_never_less_than_the_floor():
    still = (0.5, 0.5)
    for changed in ((0.5, 0.75), (0.5, 0.25)):
        progress = moved_by({"text": still, "image": changed, "multi-image": still})
        assert sum(progress.shares.values()) == pytest.approx(1)
        assert progress.shares["image"] > 1.5 * progress.first["image"]
        assert progress.shares["text"] < progress.first["text"]
        assert all(share >= CURRICULUM.floor * progress.first[name] for name, share in progress.shares.items())
        assert progress.figures()["modality_share/image"] == progress.shares["image"]


def test_without_a_difference_the_shares_stay():
    progress = moved_by(dict.fromkeys(SHARES, (0.5, 0.5)))
    assert progress.shares == pytest.approx(progress.first)


def test_what_has_stopped_improving_gets_less_again():
    progress = moved_by({"text": (0.5, 0.5), "image": (0.25, 0.75), "multi-image": (0.5, 0.5)})
    high = progress.shares["image"]
    for step in range(12, 40):
        for name in SHARES:
            for _ in range(8):
                progress.observe(name, 4, 4, expected=0.5)
        progress.advance(step + 1)
    assert progress.shares["image"] < progress.first["image"] + 0.5 * (high - progress.first["image"])


def test_progress_does_not_depend_on_the_order_of_groups_and_goes_on_from_its_state():
    groups = [(n % 9, 8 - n % 9, (n % 7) / 7) for n in range(40)]
    shares = []
    for order in (groups, groups[::-1]):
        progress = Progress(SHARES, CURRICULUM)
        for number, (passes, failures, expected) in enumerate(order):
            if number == 0:
                continue
            progress.observe("image", passes, failures, expected=expected)
        progress.observe("image", *order[0][:2], expected=order[0][2])
        progress.advance(3)
        shares.append(progress.shares)
    assert shares[0] == shares[1]
    again = Progress(SHARES, CURRICULUM)
    again.restore(json.loads(json.dumps(progress.state())))
    assert again.shares == progress.shares


def test_places_that_move_keep_the_shares_in_every_run_of_them():
    shares = {"a": 0.62, "b": 0.31, "c": 0.07}
    for first in (0, 1000, 54321):
        found = Counter(islice(scattered(shares, first), 300))
        assert all(abs(found[name] - 300 * share) <= 3 for name, share in shares.items())
    coming = BatchPlaces(10, {"a": 0.5, "b": 0.5}, refills=0, version=0)
    before = Counter(coming.take().capability for _ in range(20))
    coming.move({"a": 0.9, "b": 0.1})
    after = Counter(coming.take().capability for _ in range(100))
    assert before == {"a": 10, "b": 10}
    assert 88 <= after["a"] <= 92


def test_quotas_move_with_their_modality():
    shares = mixture_shares(ROWS, {}, modalities=SHARES)
    first = {"text": 0.5, "image": 0.25, "multi-image": 0.25}
    moved = moved_shares(shares, {"text": 0.25, "image": 0.5, "multi-image": 0.25}, first)
    assert moved == pytest.approx(
        {"chat, multi-image": 1 / 4, "chat, text": 1 / 12, "math, image": 1 / 2, "math, text": 1 / 6}
    )


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "modality_curriculum moves the shares of modalities, which has none"),
        ({"modalities": {"text": 1.0}}, "give at least two of them a share"),
        ({"modalities": SHARES, "selection": {"draw": "in_turn"}}, "which selection.draw: in_turn does without"),
    ],
)
def test_a_curriculum_that_could_move_nothing_is_refused(keys, problem):
    whole = {"model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "reward": {"name": "math"}}
    with pytest.raises(ValidationError, match=problem):
        PromptsConfig.model_validate({**whole, "modality_curriculum": {}, **keys})


def scored_group(name: str, rewards: tuple[float, ...], order: int) -> ScoredGroup:
    row = next(row for row in ROWS if row.id == name)
    rollouts = tuple(
        one_turn(name, f"g{order}", at, (), (5,), "1", (-0.5,), (VersionSpan(0, 0, 1),), "stop")
        for at in range(len(rewards))
    )
    group = Group(order, DrawnPrompt(row, None, Prompt(row.messages, (1,))), rollouts)
    return ScoredGroup(group, rewards, ("",) * len(rewards), (0.0,) * len(rewards))


def test_a_source_learns_of_progress_from_scored_groups_and_continues_from_its_state():
    def source_of() -> PromptSource:
        selection = Selection(Beliefs(ROWS, 20.0), group_size=4, seed=1, modalities=SHARES)
        return PromptSource(
            ROWS,
            SystemsConfig(),
            lambda row, messages: [1, 2],
            seed=1,
            selection=selection,
            modalities=SHARES,
            progress=Progress(SHARES, CURRICULUM),
        )

    source, shares = source_of(), mixture_shares(ROWS, {}, modalities=SHARES)
    assert source.moved(shares) == pytest.approx(shares)
    for step in range(6):
        for number, name in enumerate(("t1", "t2", "i1", "i2", "m0")):
            passes = 4 if name[0] == "i" and step > 2 else 2 * (name[0] != "i")
            rewards = tuple(float(at < passes) for at in range(4))
            source.observe(scored_group(name, rewards, number), 0.5, None)
        figures = source.advance(step + 1)
    moved = source.moved(shares)
    assert moved is not None
    assert moved["math, image"] > 1.3 * shares["math, image"]
    assert figures["modality_share/image"] == pytest.approx(moved["math, image"])
    again = source_of()
    again.restore(json.loads(json.dumps(source.state())))
    assert again.moved(shares) == moved


def test_groups_are_admitted_by_the_shares_that_moved():
    queue = StalenessQueue(20, 8, {"a": 0.5, "b": 0.5}, refills=0)
    before = Counter(queue.admit(0)[1] for _ in range(20))
    queue.move({"a": 0.9, "b": 0.1})
    after = Counter(queue.admit(0)[1] for _ in range(100))
    assert before == {"a": 10, "b": 10}
    assert 88 <= after["a"] <= 92
