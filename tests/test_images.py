"""Pictures of rows: the forms in which they are given, what is refused, how they are kept, and their tokens."""

import base64
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vision_models import image_tokenizer

from posttrain.base.pictures.tokenizer import CHAT_TEMPLATE
from posttrain.base.tokenizer import build_tokenizer, save_tokenizer
from posttrain.cli.main import main
from posttrain.data.images.decode import PictureError, checked
from posttrain.data.images.files import format_of
from posttrain.data.images.render import pictures_of, prompt_with_pictures, samples_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.images.tiles import NO_PICTURE, best_canvas, tile_rule
from posttrain.data.rows import load_rows
from posttrain.errors import CheckpointError, DataError
from posttrain.model.tokenizer import load_tokenizer
from posttrain.records import ImagePart, Message, Row, TextPart

ASK, ANSWER = "How many?", {"role": "assistant", "content": "Two."}


def picture(width: int = 40, height: int = 30, colour: object = (200, 30, 30), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)  # pyright: ignore[reportArgumentType]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "b.png").write_bytes(encoded(picture(60, 20, (0, 90, 0))))
    return tmp_path


def load(folder: Path, *rows: dict, kind: str = "supervised", **options: object):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = ImageStore(folder / "store.bin")
    return store, load_rows(folder / "rows.jsonl", kind=kind, images=ImageReader(store, **options))  # pyright: ignore


def user(content: object) -> list[dict]:
    return [{"role": "user", "content": content}, ANSWER]


def keys_of(row: Row) -> list[str]:
    return list(pictures_of(row.messages))


# --- forms ---

DATA_URL = "data:image/png;base64," + base64.b64encode(encoded(picture())).decode()
TEXT = {"type": "text", "text": ASK}
FORMS = {
    "part with a path": {"messages": user([{"type": "image", "image": "a.png"}, TEXT])},
    "part with an object": {"messages": user([{"type": "image", "image": {"path": "a.png"}}, TEXT])},
    "OpenAI, data URL": {"messages": user([{"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT])},
    "a data URL with broken lines": {
        "messages": user([{"type": "image_url", "image_url": {"url": DATA_URL[:40] + "\r\n" + DATA_URL[40:]}}, TEXT])
    },
    "OpenAI, path": {"messages": user([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT])},
    "TRL, places as parts": {"images": ["a.png"], "messages": user([{"type": "image"}, TEXT])},
    "TRL, no places": {"images": ["a.png"], "messages": user(ASK)},
    "TRL, one picture": {"image": "a.png", "messages": user(ASK)},
    "LLaMA-Factory, verl": {"images": ["a.png"], "messages": user("<image>" + ASK)},
    "ShareGPT": {
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>" + ASK}, {"from": "gpt", "value": "Two."}],
    },
    "alpaca": {"images": ["a.png"], "instruction": "<image>" + ASK, "input": "", "output": "Two."},
    "prompt and completion": {"images": ["a.png"], "prompt": ASK, "completion": "Two."},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_the_same_row(folder, name):
    store, (row,) = load(folder, FORMS[name])
    (content, answer) = (message.content for message in row.messages)
    assert answer == "Two."
    part, text = content
    assert text == TextPart(ASK)
    assert isinstance(part, ImagePart)
    (key,) = keys_of(row)
    assert (store[key].width, store[key].height) == (40, 30)
    assert store.decoded(key).getpixel((0, 0)) == (200, 30, 30)
    assert not {"images", "image"} & row.fields.keys()


def test_pictures_of_a_table_are_bytes_and_paths(folder):
    data = encoded(picture())
    column = [[{"bytes": data, "path": None}, {"bytes": None, "path": "b.png"}]]
    table = pa.table({"images": column, "messages": [user("<image> or <image>?")]})
    pq.write_table(table, folder / "rows.parquet")
    store = ImageStore(folder / "store.bin")
    (row,) = load_rows(folder / "rows.parquet", kind="supervised", images=ImageReader(store))
    assert row.messages[0].content[1] == TextPart(" or ")
    first, second = keys_of(row)
    assert store.encoded(first) == data
    assert (store[second].width, store[second].height) == (60, 20)


def test_places_are_filled_in_order_over_turns(folder):
    turns = [*user("<image>First?"), *user("<image>and<image>")]
    store, (row,) = load(folder, {"images": ["a.png", "b.png", "a.png"], "messages": turns})
    assert [store[key].width for key in keys_of(row)] == [40, 60, 40]
    assert len(store) == 2  # a picture that is shown twice is kept once


def test_a_tag_in_a_row_without_pictures_is_text(folder):
    _, (row,) = load(folder, {"messages": user("What does <image> mean?")})
    assert row.messages[0].content == "What does <image> mean?"


# --- what is refused ---


def _truncated() -> bytes:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    return data[: len(data) // 2]


def _bomb() -> bytes:
    """A PNG whose header says 100 megapixels."""
    data = bytearray(encoded(picture()))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _empty_size() -> bytes:
    return b"P6 0 0 255\n"


def _animated() -> bytes:
    return encoded(picture(), "GIF", save_all=True, append_images=[picture(colour=(0, 0, 200))])


BAD_PICTURES = {
    "no bytes": (b"", "holds no bytes"),
    "text": (b"<svg></svg>", "is none of PNG, JPEG"),
    "EPS, which would run Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of PNG, JPEG"),
    "truncated": (_truncated(), "cannot be decoded"),
    "100 megapixels": (_bomb(), "is 10000 x 10000 pixels, more than 64,000,000"),
    "0 by 0": (_empty_size(), "is none of PNG|at least one"),
    "animated": (_animated(), "is an animation of 2 pictures"),
    "floating point": (encoded(picture(colour=0.5, mode="F"), "TIFF"), "floating-point pixels"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_used_names_its_row(folder, name):
    data, message = BAD_PICTURES[name]
    (folder / "bad.png").write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        load(folder, {"images": ["a.png", "bad.png"], "messages": user("<image><image>")})
    assert "rows.jsonl: row 1: images[1]: the picture 'bad.png'" in str(raised.value)


BAD_ROWS = {
    "more pictures than places": (
        {"images": ["a.png", "b.png"], "messages": user("<image>?")}, "images: 2 pictures, but 1 places for them",
    ),
    "fewer pictures than places": (
        {"images": ["a.png"], "messages": user("<image> <image>?")}, "images: 1 pictures, but 2 places for them",
    ),
    "a place without any picture": ({"messages": user([{"type": "image"}, TEXT])}, "0 pictures, but 1 places"),
    "a missing file": ({"images": ["c.png"], "messages": user(ASK)}, r"images\[0\]: the picture 'c.png' is no file in"),
    "a folder": ({"images": ["."], "messages": user(ASK)}, "is no file in"),
    "outside of the root": ({"images": ["../a.png"], "messages": user(ASK)}, "'../a.png' lies outside"),
    "an absolute path": ({"images": ["/etc/passwd"], "messages": user(ASK)}, "'/etc/passwd' lies outside"),
    "an address": ({"images": ["https://host/a.png"], "messages": user(ASK)}, "nothing is downloaded"),
    "a name that no file has": ({"images": ["a\0.png"], "messages": user(ASK)}, "has a zero character"),
    "a picture in another key": (
        {"messages": user([{"type": "image", "base64": "aGk="}, TEXT])}, r"content\[0\].base64: a picture is not read",
    ),
    "damaged base64": ({"images": ["data:image/png;base64,!"], "messages": user(ASK)}, "whose base64 is damaged"),
    "a number": ({"images": [3], "messages": user(ASK)}, "the picture 3 must be a path, a data URL"),
    "too many": ({"images": ["a.png"] * 9, "messages": user(ASK)}, "9 pictures; at most 8 of a row are taken"),
    "two columns": ({"images": ["a.png"], "image": "a.png", "messages": user(ASK)}, "one of these columns"),
    "in a reply": (
        {"images": ["a.png"], "prompt": ASK, "completion": "<image>"},
        r"messages\[1\]: a picture in a turn of assistant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_rule(folder, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=message) as raised:
        load(folder, row)
    assert "rows.jsonl: row 1: " in str(raised.value)


def test_a_link_out_of_the_root_is_outside(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "secret.png"
    other.write_bytes(encoded(picture()))
    (folder / "link.png").symlink_to(other)
    with pytest.raises(DataError, match=r"'link.png' lies outside"):
        load(folder, {"images": ["link.png"], "messages": user(ASK)})
    assert len(load(folder, {"images": [str(other)], "messages": user(ASK)}, root=other.parent)[1]) == 1


# --- modes ---


@pytest.mark.parametrize(
    ("image", "form", "want"),
    [
        (picture(colour=(255, 0, 0, 0), mode="RGBA"), "PNG", (255, 255, 255)),
        (picture(colour=(255, 0, 0, 255), mode="RGBA"), "PNG", (255, 0, 0)),
        (picture(colour=(0, 128), mode="LA"), "PNG", (127, 127, 127)),
        (picture(colour=77, mode="L"), "PNG", (77, 77, 77)),
        (picture(colour=1, mode="1"), "PNG", (255, 255, 255)),
        (picture(colour=0x8000, mode="I;16"), "PNG", (127, 127, 127)),
        (picture(colour=(0, 0, 0, 255), mode="CMYK"), "TIFF", (0, 0, 0)),
    ],
    ids=["RGBA clear", "RGBA", "LA", "L", "1", "16 bits", "CMYK"],
)
def test_every_mode_becomes_rgb(tmp_path, image, form, want):
    store = ImageStore(tmp_path / "store.bin")
    found = store.decoded(store.add(encoded(image, form)).key)
    assert found.mode == "RGB"
    assert found.getpixel((3, 3)) == pytest.approx(want, abs=1)


def test_a_palette_with_a_transparent_colour_becomes_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    store = ImageStore(tmp_path / "store.bin")
    assert store.decoded(store.add(encoded(image, "PNG", transparency=1)).key).getpixel((0, 0)) == (255, 255, 255)


def test_a_turned_picture_is_made_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    found = checked(encoded(picture(40, 30), "JPEG", exif=exif))
    assert (found.width, found.height) == (30, 40)


def test_a_plain_picture_keeps_its_bytes():
    data = encoded(picture(), "JPEG")
    assert checked(data).data == data


def test_a_photo_with_more_pictures_behind_it_is_the_photo():
    """As phones write them: a JPEG, then a smaller copy or a depth map (the format MPO)."""
    data = encoded(picture(40, 30, (9, 90, 200)), "MPO", save_all=True, append_images=[picture(8, 6)])
    found = checked(data)
    assert (found.data, found.width, found.height) == (data, 40, 30)
    assert format_of(data) == "jpeg"


def test_damaged_bytes_are_told_as_a_fault_of_the_picture():
    """Pillow raises errors of many kinds for them."""
    wholes = [
        encoded(picture(mode=mode, colour=colour), form)
        for mode, colour, form in (
            ("RGB", (1, 2, 3), "TIFF"), ("L", 7, "TIFF"), ("RGB", (1, 2, 3), "JPEG"), ("RGBA", (1, 2, 3, 4), "PNG"),
            ("RGB", (1, 2, 3), "WEBP"), ("RGB", (1, 2, 3), "GIF"), ("RGB", (1, 2, 3), "BMP"), ("RGB", (0, 0, 0), "PPM"),
        )
    ]  # fmt: skip
    draws, refused = random.Random(1), 0
    for _ in range(1500):
        data = bytearray(draws.choice(wholes))
        for _ in range(draws.randint(1, 6)):
            data[draws.randrange(min(len(data), 400))] = draws.randrange(256)
        try:
            checked(bytes(data))
        except PictureError:
            refused += 1
    assert refused > 500


# --- the store ---


def test_another_process_reads_what_was_written(tmp_path):
    store = ImageStore(tmp_path / "store.bin")
    keys = [store.add(encoded(picture(8, 8, (n, 0, 0)))).key for n in range(5)]
    other = ImageStore(tmp_path / "store.bin")
    assert [other.decoded(key).getpixel((0, 0))[0] for key in keys] == list(range(5))
    other.add(encoded(picture(8, 8, (9, 0, 0))))
    assert len(ImageStore(tmp_path / "store.bin")) == 6


def test_a_store_goes_on_after_a_write_that_was_cut_off(tmp_path):
    store = ImageStore(tmp_path / "store.bin")
    key = store.add(encoded(picture())).key
    with store.path.open("ab") as file:
        file.write(b"half a picture")
    with store.path.with_name("store.bin.jsonl").open("ab") as file:
        file.write(b'{"key":"12')
    again = ImageStore(tmp_path / "store.bin")
    other = again.add(encoded(picture(9, 9, (1, 2, 3)))).key
    last = ImageStore(tmp_path / "store.bin")
    assert [last.decoded(name).size for name in (key, other)] == [(40, 30), (9, 9)]


def test_a_picture_that_is_there_is_not_decoded_again(tmp_path, monkeypatch):
    store = ImageStore(tmp_path / "store.bin")
    first = store.add(encoded(picture()))
    monkeypatch.setattr("posttrain.data.images.store.checked", None)
    assert store.add(encoded(picture())) == first


def test_rows_with_pictures_take_little_memory(folder):
    """100,000 of them must fit into 200 MiB: 2 KiB a row."""
    rng = random.Random(0)
    rows = []
    for number in range(300):
        data = encoded(picture(16, 16, tuple(rng.randrange(256) for _ in range(3))))
        url = "data:image/png;base64," + base64.b64encode(data + bytes(4096)).decode()
        rows.append({"images": [url], "messages": user(f"<image>{number}?")})
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        held = load(folder, *rows)
        rows.clear()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(held[1]) == 300
    assert used / 300 < 2048


# --- tiles and tokens ---


def write_model(folder: Path, **changes: object) -> Path:
    """A folder without weights: config.json, processor_config.json, tokenizer."""
    tokenizer = image_tokenizer()
    save_tokenizer(tokenizer, folder)
    vision = {"image_size": 56, "patch_size": 14, "pixel_shuffle_ratio": 0.5}
    config = {
        "model_type": "llama4",
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("<|patch|>"),
    }
    processor = {"image_processor": {"size": {"height": 56, "width": 56}, "max_patches": 4}, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rule(model):
    return tile_rule(model, image_tokenizer())


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 17), st.sampled_from([56, 336, 448]), st.booleans())
def test_the_canvas_is_that_of_the_processor(height, width, max_tiles, tile, largest):
    import torch
    from transformers.image_utils import SizeDict

    processing = pytest.importorskip("transformers.models.llama4.image_processing_llama4")
    size = SizeDict(height=tile, width=tile)
    canvases = torch.tensor(processing.find_supported_resolutions(max_num_chunks=max_tiles, patch_size=size))
    want = processing.get_best_fit((height, width), canvases, resize_to_max_canvas=largest)
    got = best_canvas(height, width, tile=tile, max_tiles=max_tiles, to_max_canvas=largest)
    assert [side * tile for side in got] == [int(side) for side in want]


def test_tokens_and_tiles_are_those_of_the_processor(rule, tmp_path):
    pytest.importorskip("torchvision")
    from transformers import Llama4ImageProcessor, Llama4Processor

    tokenizer = image_tokenizer()
    images = Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    processor: Any = Llama4Processor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, pixel_shuffle_ratio=0.5
    )
    processor.save_pretrained(write_model(tmp_path))
    assert tile_rule(tmp_path, tokenizer) == rule
    for width, height in ((40, 30), (56, 56), (57, 56), (200, 50), (50, 200), (300, 290), (9, 400), (113, 60)):
        found = processor(
            text="<|image|>", images=[picture(width, height)], add_special_tokens=False, return_tensors="pt"
        )
        assert list(found["input_ids"][0]) == rule.ids(width, height)
        assert len(found["pixel_values"]) == rule.num_tiles(width, height)


def test_a_conversation_with_pictures_in_tokens(folder, rule):
    store, (row,) = load(folder, {"images": ["a.png", "b.png"], "messages": user("<image> or <image>?")})
    tokenizer = image_tokenizer()
    (sample,) = samples_with_pictures(tokenizer, row.messages, store, rule=rule)
    patch = tokenizer.convert_tokens_to_ids("<|patch|>")
    tokens = [rule.ids(40, 30), rule.ids(60, 20)]
    assert [sample.ids[at] for at, owner in enumerate(sample.owners) if owner != NO_PICTURE] == [*tokens[0], *tokens[1]]
    assert [sample.owners.count(owner) for owner in (0, 1)] == [len(ids) for ids in tokens]
    assert sample.ids.count(patch) == rule.features * (rule.num_tiles(40, 30) + rule.num_tiles(60, 20))
    trained = tokenizer.decode([token for token, bit in zip(sample.ids, sample.mask, strict=True) if bit])
    assert trained == "Two.<|eot|>"
    prompt = prompt_with_pictures(tokenizer, row.messages[:1], store, rule=rule)
    assert sample.ids[: len(prompt.ids)] == prompt.ids
    assert not any(prompt.mask)


def test_an_image_token_that_is_typed_is_text(folder, rule):
    """A row cannot forge a picture."""
    store, (row,) = load(folder, {"images": ["a.png"], "messages": user("<image> <|image|> <|patch|>?")})
    tokenizer = image_tokenizer()
    (sample,) = samples_with_pictures(tokenizer, row.messages, store, rule=rule)
    assert sample.ids.count(rule.patch) == rule.features
    assert "<|image|> <|patch|>?" in tokenizer.decode([t for t, o in zip(sample.ids, sample.owners, strict=True) if o])


def test_a_template_that_leaves_pictures_out_is_refused(folder, rule):
    store, (row,) = load(folder, {"images": ["a.png"], "messages": user("<image>?")})
    tokenizer = image_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ '<|image|>' }}", "")
    with pytest.raises(DataError, match=r"the chat template shows 0 of 1 pictures"):
        samples_with_pictures(tokenizer, row.messages, store, rule=rule)


def test_an_image_processor_may_have_a_file_of_its_own(tmp_path, rule):
    """As in the published folders of Llama 4."""
    file = write_model(tmp_path) / "processor_config.json"
    whole = json.loads(file.read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
    file.write_text(json.dumps(whole))
    assert tile_rule(tmp_path, image_tokenizer()) == rule
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no image processor"):
        tile_rule(tmp_path, image_tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama4_text"}, "model_type is 'llama4_text', which takes no images"),
        ({"vision_config": {"image_size": 336}}, "the processor has image_size 56, and the model 336"),
        ({"image_token_index": 3}, r"image_token_index in config.json is 3"),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        tile_rule(write_model(tmp_path, **changes), image_tokenizer())


def test_a_tokenizer_without_image_tokens_is_named(model):
    with pytest.raises(CheckpointError, match=r"its tokenizer lacks <\|image\|>, <\|patch\|>"):
        tile_rule(model, build_tokenizer())


def test_no_form_is_lost_on_a_row_of_text(folder):
    _, (row,) = load(folder, {"messages": user("plain"), "id": "x", "extra": 1})
    assert row.messages[0] == Message("user", "plain")
    assert row.fields == {"extra": 1}


def test_preview_shows_where_pictures_stand_and_how_long_they_are(folder, model, capsys):
    rows = [{"id": "x", "images": ["a.png", "b.png"], "messages": user("<image> or <image>?")}]
    (folder / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(["data", "preview", str(folder / "rows.jsonl"), "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "[picture 1: 40 x 30 pixels, 1 tile, 7 tokens] or [picture 2: 60 x 20 pixels, 3 tiles, 17 tokens]?" in shown
    assert "[[Two.<|eot|>]]" in shown
    arguments = ["--images-root", str(model), "--max-images", "1"]
    assert main(["data", "preview", str(folder / "rows.jsonl"), "--model", str(model), *arguments]) == 2
    assert "2 pictures; at most 1 of a row are taken" in capsys.readouterr().err


def test_a_text_model_shows_no_pictures(folder, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("text")
    save_tokenizer(build_tokenizer(), other)
    (other / "config.json").write_text('{"model_type": "llama4_text"}')
    (folder / "rows.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": user(ASK)}) + "\n")
    assert main(["data", "preview", str(folder / "rows.jsonl"), "--model", str(other)]) == 2
    assert "model_type is 'llama4_text', which takes no images" in capsys.readouterr().err


def test_inspect_counts_pictures_and_their_tokens(folder, model, capsys):
    """With a multimodal model; a picture that is missing makes its row bad."""
    rows = [
        {"images": ["a.png", "b.png"], "messages": user(f"<image> or <image>? {ASK}")},
        {"messages": user(ASK)},
        {"images": ["lost.png"], "messages": user(ASK)},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "inspect", str(folder / "rows.jsonl"), "--model", str(model), "--json"]
    assert main(arguments) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["bad_rows"], found["pictures"]) == (2, 1, {"0": 1, "2": 1})
    store, (row, _) = load(folder, *rows[:2])
    (sample,) = samples_with_pictures(
        load_tokenizer(model), row.messages, store, rule=tile_rule(model, load_tokenizer(model))
    )
    assert found["lengths"]["max"] == len(sample.ids)
    assert "lost.png" in found["problems"][0]
    (folder / "pairs.jsonl").write_text(
        json.dumps({"images": ["a.png"], "prompt": ASK, "chosen": "2", "rejected": "3"})
    )
    assert main(["data", "inspect", str(folder / "pairs.jsonl"), "--model", str(model)]) == 0
    assert "rows by pictures: 1 1" in capsys.readouterr().out
