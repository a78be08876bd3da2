"""A folder that the trainer and the engine would read as two different models is refused before either reads it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from template_families import FAMILIES, Family, tokenizer_of
from test_model_load import tiny_tokenizer
from test_model_router import tiny_model

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.errors import CheckpointError
from posttrain.model import load_model, load_tokenizer, save_model
from posttrain.model.folder import INDEX, check_folder, folder_problems
from posttrain.model.tokenizer import FAMILIES as CLASSES
from posttrain.model.tokenizer import _class_of
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


def save_family(family: Family, model_type: str, named: str, folder: Path) -> Path:
    """A folder with the tokenizer of a family, whose config names a class."""
    tokenizer_of(family).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": named}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_equal_tokenizers(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.init_kwargs == theirs.init_kwargs
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()  # the ids of every text
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_tokenizer_of_a_family_is_that_of_auto_tokenizer(model_type, tmp_path):
    from transformers import AutoTokenizer

    number = list(CLASSES).index(model_type)
    family = list(FAMILIES.values())[number % len(FAMILIES)]
    named = CLASSES[model_type] if CLASSES[model_type] != "TokenizersBackend" else "LlamaTokenizer"
    folder = save_family(family, model_type, named + ("Fast" if number % 2 else ""), tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert_equal_tokenizers(load_tokenizer(folder), theirs)


def test_only_a_class_that_fits_the_model_is_taken_without_auto_tokenizer(tmp_path):
    """The class of another family, and a folder of an owner that AutoTokenizer knows by name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = save_family(FAMILIES["chatml"], "qwen2", "LlamaTokenizer", tmp_path / "model")
    assert _class_of(folder) is AutoTokenizer
    folder = save_family(FAMILIES["chatml"], "llama", "LlamaTokenizer", tmp_path / "DeepSeek-AI" / "coder")
    assert _class_of(folder) is AutoTokenizer
    folder = save_family(FAMILIES["chatml"], "unheard_of", "PreTrainedTokenizerFast", tmp_path / "own")
    assert _class_of(folder) is PreTrainedTokenizerFast


@pytest.mark.slow
def test_a_tokenizer_is_loaded_without_torch(policy, tmp_path):
    family = save_family(FAMILIES["qwen3"], "qwen3", "Qwen2Tokenizer", tmp_path / "model")
    code = (
        "import sys\n"
        "from posttrain.model.tokenizer import load_tokenizer\n"
        "names = [type(load_tokenizer(path)).__name__ for path in sys.argv[1:]]\n"
        "assert names == ['TokenizersBackend', 'Qwen2Tokenizer'], names\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(policy), str(family)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    assert_equal_tokenizers(load_tokenizer(policy), AutoTokenizer.from_pretrained(policy, local_files_only=True))
