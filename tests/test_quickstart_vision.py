"""The recipe with pictures, from the built wheel: a reduced visual quick start. Everything is real and only smaller."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from posttrain.files import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

REDUCED = ["base.steps=250", "rl.steps=4", "rl.groups_per_step=16", "evaluate.pass_k_limit=20"]
MODALITIES = {"modality: text", "modality: image", "modality: multi-image"}


@pytest.fixture(scope="module")
def run(installed_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = tmp_path_factory.mktemp("user") / "empty"
    empty.mkdir()
    done = subprocess.run(
        [str(installed_wheel), "run", "quickstart-vision", *REDUCED],
        cwd=empty,
        env={**os.environ, "POSTTRAIN_CACHE": str(empty.parent / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return empty / "runs" / "quickstart-vision"


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_every_stage_is_done_and_measured_by_modality(summary):
    assert summary["status"] == "done"
    assert {stage["name"]: stage["status"] for stage in summary["stages"]} == dict.fromkeys(
        ("base", "filter", "sft", "rl", "dpo"), "done"
    )
    assert set(summary["eval"]) == {"base", "sft", "rl", "dpo"}
    for results in summary["eval"].values():
        assert set(results) >= MODALITIES
        assert sum(results[name]["n"] for name in MODALITIES) == results["all"]["n"] == 560
        assert all(figures["unscored"] == 0 for figures in results.values())


def test_rl_trained_on_every_modality(run):
    rollouts = [
        row for path in sorted((run / "rl" / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    trained = [json.loads(row["prompt"]) for row in rollouts if row["status"] == "trained"]
    assert len(trained) == 4 * 16 * 8
    shown = {sum(part.get("type") == "image" for part in _parts(prompt)) for prompt in trained}
    assert {0, 1} < shown


def _parts(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    content = prompt[-1]["content"]
    return content if isinstance(content, list) else []


def test_pairs_of_dpo_show_pictures(run):
    prompts = [json.dumps(pair["prompt"]) for pair in read_jsonl(run / "dpo" / "pairs.jsonl")]
    assert any('"type": "image"' in prompt for prompt in prompts)


def test_transformers_loads_the_result_with_its_processor(run):
    from transformers import AutoProcessor, Llama4ForConditionalGeneration

    for stage in ("base", "sft", "rl", "dpo"):
        model = Llama4ForConditionalGeneration.from_pretrained(run / stage / "model")
        assert model.config.architectures == ["Llama4ForConditionalGeneration"]
    assert AutoProcessor.from_pretrained(run / "dpo" / "model").image_processor.size["height"] == 42


def test_report_shows_pictures_and_modalities(run):
    page = (run / "report.html").read_text()
    assert "data:image/" in page
    assert all(name in page for name in MODALITIES)
    assert not re.search(r"""<(script|img|link|iframe|source)\b[^>]*\b(src|href)=["']?https?:""", page)
