"""What every stage that takes pictures refuses, from the command line, before it loads a model or starts Ray."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from vision_folder import REWARD, write_picture_pairs, write_picture_prompts, write_picture_rows
from vision_models import draw, save_vision_policy

from posttrain.cli.main import main

KINDS = ("filter", "sft", "rl", "dpo", "eval")


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("vision") / "model")


class Asked:
    """A stage's config with rows that show pictures. Tests change rows, model and keys, and then `told`."""

    def __init__(self, kind: str, model: Path, folder: Path):
        self.kind, self.folder = kind, folder
        (folder / "reward.py").write_text(REWARD)
        served = {"path": str(model), "dtype": "float32"}
        self.rows = {
            "filter": lambda: write_picture_rows(folder, 8), "sft": lambda: write_picture_rows(folder, 8),
            "rl": lambda: write_picture_prompts(folder, 8), "eval": lambda: write_picture_prompts(folder, 8),
            "dpo": lambda: write_picture_pairs(folder, range(8)),
        }[kind]()  # fmt: skip
        data = {"rl": "prompts", "dpo": "pairs"}.get(kind, "data")
        self.config: dict[str, Any] = {
            "judge" if kind == "filter" else "model": served, data: {"path": str(self.rows)}, "images": {}
        }  # fmt: skip
        if kind in ("rl", "eval"):
            self.config["reward"] = {"name": f"{folder}/reward.py:even_share"}

    @property
    def model(self) -> dict[str, str]:
        return self.config["judge" if self.kind == "filter" else "model"]

    def change_row(self, number: int, **columns: Any) -> None:
        """Set columns of a row; `question` replaces what it asks."""
        lines = [json.loads(line) for line in self.rows.read_text().splitlines()]
        row = lines[number - 1]
        question = columns.pop("question", None)
        if question is not None and self.kind == "dpo":
            row["prompt"] = question
        elif question is not None:
            row["messages"][0]["content"] = question
        row.update(columns)
        self.rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def told(self, capsys: pytest.CaptureFixture[str]) -> str:
        """What the command says about the config, which must be refused with exit code 2."""
        (self.folder / "stage.yaml").write_text(yaml.safe_dump(self.config))
        code = main([self.kind, str(self.folder / "stage.yaml"), "--dry-run"])
        found = " ".join(capsys.readouterr().err.split())
        assert code == 2, found
        return found


def _cut(asked: Asked) -> None:
    draw(asked.folder / "cut.png", 3, (90, 90))
    data = (asked.folder / "cut.png").read_bytes()
    (asked.folder / "cut.png").write_bytes(data[: len(data) // 2])
    asked.change_row(2, images=["cut.png"], question="<image>?")


def _one(*names: str, question: str = "<image>?") -> Callable[[Asked], None]:
    draw_too = [name for name in names if name == "own.png"]

    def change(asked: Asked) -> None:
        for name in draw_too:
            draw(asked.folder / name, 1)
        asked.change_row(2, images=list(names), question=question)

    return change


BAD_ROWS: dict[str, tuple[Callable[[Asked], None], list[str]]] = {
    "fewer pictures than places": (_one("own.png", question="<image> <image>?"), ["1 pictures, but 2 places", "give"]),
    "more pictures than places": (_one("own.png", "own.png"), ["2 pictures, but 1 places", "give each picture one"]),
    "outside of the root": (_one("../own.png"), ["'../own.png' lies outside", "images.root"]),
    "missing": (_one("none.png"), ["'none.png' is no file in"]),
    "truncated": (_cut, ["'cut.png' cannot be decoded"]),
    "too many": (
        _one(*["own.png"] * 9, question="<image>" * 9), ["9 pictures; at most 8 of a row", "images.max_images"],
    ),
    "an address": (_one("http://host/a.png"), ["is at an address, and nothing is downloaded", "give the path"]),
    "an address of a bucket": (_one("s3://bucket/a.png"), ["is at an address, and nothing is downloaded"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_told_by_every_stage(name, kind, vision, tmp_path, capsys):
    asked = Asked(kind, vision, tmp_path)
    change, words = BAD_ROWS[name]
    change(asked)
    told = asked.told(capsys)
    assert "row 2" in told
    assert all(word in told for word in words), told


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_pictures_need_the_section(kind, vision, tmp_path, capsys):
    asked = Asked(kind, vision, tmp_path)
    del asked.config["images"]
    told = asked.told(capsys)
    assert "row 2" in told
    assert f"stage {kind} works on text only; set images: {{}} for a multimodal model" in told


def _processor(folder: Path) -> None:
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["size"] = {"height": 84, "width": 84}
    file.write_text(json.dumps(settings))


def _of(name: str) -> Callable[[Path], None]:
    """Another architecture's config.json, as transformers writes it."""

    def write(folder: Path) -> None:
        import transformers

        getattr(transformers, name)().save_pretrained(folder)

    return write


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another model's processor": (_processor, "the processor has image_size 84, and the model 56"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "no image processor"),
    "a text model": (_of("Llama4TextConfig"), "model_type is 'llama4_text', which takes no images"),
    "Qwen2.5-VL": (_of("Qwen2_5_VLConfig"), "model_type is 'qwen2_5_vl', which takes no images here"),
    "SmolVLM": (_of("SmolVLMConfig"), "model_type is 'smolvlm', which takes no images here"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_shown_pictures_is_named_by_every_stage(name, kind, vision, tmp_path, capsys):
    change, words = MODELS[name]
    folder = shutil.copytree(vision, tmp_path / "model")
    change(folder)
    told = Asked(kind, folder, tmp_path).told(capsys)
    assert "images: " in told
    assert words in told, told


WORLD = """
async def looks(session, row):
    await session.sample()
    return 1.0
"""


@pytest.mark.parametrize("kind", ["rl", "eval"])
def test_a_row_with_pictures_whose_capability_has_an_environment_is_named(kind, vision, tmp_path, capsys):
    asked = Asked(kind, vision, tmp_path)
    (tmp_path / "world.py").write_text(WORLD)
    asked.config["environment"] = {"by_capability": {"general": {"name": f"{tmp_path}/world.py:looks"}}}
    told = asked.told(capsys)
    assert "row 'p1': it has pictures, and its capability 'general' an environment; episodes take text only" in told


def test_a_modality_that_no_prompt_has_is_named(vision, tmp_path, capsys):
    asked = Asked("rl", vision, tmp_path)
    asked.config["modalities"] = {"text": 1.0, "multi-image": 1.0}
    asked.rows.write_text("".join(line for line in asked.rows.open() if len(json.loads(line)["images"]) < 2))
    assert "modalities.multi-image: no prompt of a capability in mixture has this modality; there are: " in asked.told(
        capsys
    )
