"""Quotas and beliefs by modality: text, one picture, several."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from posttrain.config.images import Modality
from posttrain.config.rewards import SystemsConfig
from posttrain.data.images.references import load_image
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.rows import store_rows
from posttrain.errors import ConfigError
from posttrain.records import ImagePart, Message, Row, TextPart
from posttrain.rl.prompts.beliefs import Beliefs
from posttrain.rl.prompts.lengths import plain_prompts
from posttrain.rl.prompts.quotas import mixture_shares, places
from posttrain.rl.prompts.selection import Selection
from posttrain.rl.prompts.source import PromptSource


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
