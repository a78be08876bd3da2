"""A folder that the trainer and the engine would read as two different models is refused before either reads it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_model_load import tiny_tokenizer
from test_model_router import tiny_model

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.errors import CheckpointError
from posttrain.model import load_model, load_tokenizer, save_model
from posttrain.model.folder import INDEX, check_folder, folder_problems
from posttrain.pipeline.model_folders import model_folder_problems
from posttrain.sampling.client import Engines

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")


def index(folder: Path, *files: str, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"weight_map": {f"{NORM}.{file}": file for file in files}}))


def copy(folder: Path, *files: str) -> None:
    for file in files:
        shutil.copy(folder / "model.safetensors", folder / file)


def sharded(folder: Path) -> None:
    """An index and two shards in place of the single file."""
    copy(folder, "a.safetensors", "b.safetensors")
    index(folder, "a.safetensors", "b.safetensors")
    (folder / "model.safetensors").unlink()


def single_beside_shards(folder: Path) -> None:
    copy(folder, "a.safetensors", "b.safetensors")
    index(folder, "a.safetensors", "b.safetensors")


def single_among_the_shards(folder: Path) -> None:
    copy(folder, "b.safetensors")
    index(folder, "model.safetensors", "b.safetensors")


def two_indexes(folder: Path) -> None:
    sharded(folder)
    index(folder, "a.safetensors", name="other.safetensors.index.json")


TWO_SETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "single file beside shards": (single_beside_shards, r"lists and, beside them, model\.safetensors;"),
    "single file among the shards": (single_among_the_shards, r"lists model\.safetensors and 1 more files"),
    "two indexes": (two_indexes, r"2 indexes of weights \(model\.safetensors\.index\.json, other\.safetensors"),
    "shards without an index": (lambda folder: copy(folder, "a.safetensors"), r"and beside it a\.safetensors;"),
}


@pytest.mark.parametrize("case", TWO_SETS)
def test_two_sets_of_weights_are_refused_by_trainer_engine_and_validate(case: str, folder: Path) -> None:
    damage, message = TWO_SETS[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    with pytest.raises(CheckpointError, match=message):
        engines(folder).__enter__()
    (line,) = model_folder_problems(str(folder))
    assert line.startswith(f"got {str(folder)!r}: this folder ")
    assert "one set of weights" in line


def engines(folder: Path) -> Engines:
    model = ServedModelConfig(path=str(folder), dtype="float32")
    return Engines(
        StageContext("eval", folder, folder / "events.jsonl"), model, EngineConfig(), resources=ActorResources()
    )


@pytest.mark.parametrize("change", [lambda folder: None, sharded, lambda folder: index(folder, "model.safetensors")])
def test_one_set_of_weights_is_taken(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")  # read by nobody
    assert folder_problems(folder) == []


@pytest.mark.parametrize("beyond", [0, 1, 3])
def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(beyond: int, tmp_path: Path) -> None:
    """Added tokens count: the id of the last one is named, with both sizes."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    size = model.config.vocab_size
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), size + beyond)])
    folder = save_model(model, tokenizer, tmp_path / "model")
    if not beyond:
        assert len(load_tokenizer(folder)) == size
        assert model_folder_problems(str(folder)) == []
        return
    last = size + beyond - 1
    message = f"gives '<{last}>' the id {last}, and so has {size + beyond} ids; its model has {size} embeddings"
    for read in (load_tokenizer, check_folder):
        with pytest.raises(CheckpointError, match=message):
            read(folder)
    assert message in model_folder_problems(str(folder))[0]


@pytest.mark.parametrize(
    "vocabulary", [{"a": 0, "far": 8}, [["a", -1.0]] * 8 + [["far", -2.0]]], ids=["by token", "by place"]
)
def test_both_forms_of_a_vocabulary_are_read(vocabulary: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 8}, "vocab_size": 900}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (problem,) = folder_problems(tmp_path)
    assert "'far' the id 8, and so has 9 ids; its model has 8 embeddings" in problem


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_stand_beside_the_tokenizer_count(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    added = {
        "added_tokens.json": {"far": 9},
        "tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "far"}}},
    }
    (tmp_path / file).write_text(json.dumps(added[file]))
    (problem,) = folder_problems(tmp_path)
    assert "'far' the id 9" in problem


@pytest.mark.slow
def test_a_generic_tokenizer_is_that_of_auto_tokenizer_and_is_loaded_without_torch(policy):
    code = (
        "import sys\n"
        "from posttrain.model.tokenizer import load_tokenizer\n"
        "ours = load_tokenizer(sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
        "from transformers import AutoTokenizer\n"
        "theirs = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "assert type(ours) is type(theirs)\n"
        "assert ours.init_kwargs == theirs.init_kwargs, (ours.init_kwargs, theirs.init_kwargs)\n"
        "assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()\n"
        "assert ours.special_tokens_map == theirs.special_tokens_map\n"
        "assert ours.chat_template == theirs.chat_template\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(policy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
