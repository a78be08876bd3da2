"""Checks of a model folder before any weight is loaded. The trainer, the engines and `posttrain validate` share them.

Only file names, JSON and the headers of weight files are read, so a check takes milliseconds and needs no torch. Left
out: the tensors themselves, which are checked when they are loaded.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")  # quantized tensors
SMALL_FLOATS = ("F8_", "F6_", "F4")  # dtypes that safetensors has only for quantized weights
LENGTH_BYTES = 8  # at the beginning of a safetensors file: the length of its header


def check_folder(path: str | Path) -> None:
    """Raise CheckpointError for a folder with two sets of weights, or with a tokenizer that its model does not fit."""
    problems = folder_problems(Path(path).expanduser())
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def folder_problems(folder: Path) -> list[str]:
    """The faults of a folder's weights and tokenizer, one line each.

    A missing config or tokenizer is no fault here: the code that needs the file reports it.
    """
    return [*weight_problems(folder), *header_problems(folder), *tokenizer_problems(folder)]


def header_problems(folder: Path) -> list[str]:
    """One line for each safetensors file whose header cannot be read, or does not fit the size of the file."""
    problems = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except (OSError, ValueError) as error:
            problems.append(f"has {path.name}, which cannot be read as safetensors: {error}; copy or download it again")
    return problems


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name: dtype, shape, data_offsets. Reads the header alone.

    Raises OSError, and ValueError for a file that is not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(LENGTH_BYTES)
        length = int.from_bytes(first, "little")
        if len(first) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise ValueError(f"its header would end after the file's {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            wanted = LENGTH_BYTES + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        except (ValueError, AttributeError, TypeError, KeyError, IndexError):
            raise ValueError("its header is damaged") from None
    if size != wanted:
        raise ValueError(f"it has {size} bytes, and its header lists {wanted}")
    return header


def quantization(folder: Path) -> str | None:
    """What says that the weights of a folder's model are quantized, such as a gptq section; None if nothing does."""
    config = _json(folder / "config.json")
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        if isinstance(part, dict) and isinstance(found := part.get("quantization_config"), dict):
            return f"{found.get('quant_method', 'some method')}; quantization_config in config.json"
    for path in sorted(folder.glob("*.safetensors")):
        for name, item in _header(path).items():
            if name.endswith(PACKED) or str(item.get("dtype")).startswith(SMALL_FLOATS):
                return f"{name} in {path.name} is {item.get('dtype')}"
    return None


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a weight file; empty if it cannot be read, which `header_problems` reports."""
    try:
        return read_header(path)
    except (OSError, ValueError):
        return {}


def weight_problems(folder: Path) -> list[str]:
    """One line if a folder holds two sets of weights, or lacks a part of one, else an empty list.

    From such a folder transformers loads model.safetensors, and vLLM the files of the index or all files. So one model
    would be trained and another one sampled.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    indexes = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    rule = "a model folder must hold one set of weights; move the other files elsewhere"
    if len(indexes) > 1:
        return [f"has {len(indexes)} indexes of weights ({', '.join(indexes)}); {rule}"]
    if not indexes:
        others = [name for name in names if name != SINGLE]
        return [f"has {SINGLE} and beside it {_some(others)}; {rule}"] if SINGLE in names and others else []
    listed = _listed(folder / indexes[0])
    if listed is None:
        return [f"has {indexes[0]}, which cannot be read as an index of weights; copy or download it again"]
    missing = sorted(name for name in listed if name not in names)
    if missing:
        return [f"lacks {_some(missing)}, which {indexes[0]} lists; copy or download what is missing"]
    others = [name for name in names if name not in listed]
    if others:
        return [f"has weights that {indexes[0]} lists and, beside them, {_some(others)}; {rule}"]
    if SINGLE in listed and len(listed) > 1:
        return [
            f"has {indexes[0]}, which lists {SINGLE} and {len(listed) - 1} more files; some loaders read {SINGLE} "
            f"alone; {rule}"
        ]
    return []


def _listed(index: Path) -> set[str] | None:
    data = _json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    return set(map(str, names.values())) if isinstance(names, dict) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tokenizer_problems(folder: Path, vocabulary: Mapping[str, int] | None = None) -> list[str]:
    """One line if the tokenizer has token ids for which the model has no embedding, else an empty list.

    Looking such an id up would fail, or read memory that is no embedding. vocabulary: token -> id of a loaded
    tokenizer; None reads the folder's JSON files, which do not list the tokens of a tokenizer.model.
    """
    size = embeddings(folder)
    ids = dict(vocabulary) if vocabulary is not None else dict(_tokens(folder))
    if size is None or not ids:
        return []
    token = max(ids, key=ids.__getitem__)
    if ids[token] < size:
        return []
    beyond = sum(number >= size for number in ids.values())
    return [
        f"has a tokenizer that gives {token!r} the id {ids[token]}, and so has {ids[token] + 1} ids; its model has "
        f"{size} embeddings (vocab_size in config.json), so {beyond} token{'s' * (beyond > 1)} cannot be read; take "
        "the tokenizer that belongs to the model, or resize the embeddings to it"
    ]


def embeddings(folder: Path) -> int | None:
    """The number of embeddings of a folder's model, from its config.json; None if config.json does not say."""
    config = _json(folder / "config.json")
    for part in (config.get("text_config"), config) if isinstance(config, dict) else ():
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int):
            return size
    return None


def _tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of every token in the JSON files of a tokenizer, with the added tokens."""
    data = _json(folder / "tokenizer.json")
    data = data if isinstance(data, dict) else {}
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((str(token), number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):  # entries are (token, score), and the id is the place in the list
        yield from ((str(entry[0]), number) for number, entry in enumerate(vocabulary) if entry)
    for entry in data.get("added_tokens") or ():
        yield str(entry.get("content")), int(entry.get("id", 0))
    more = _json(folder / "tokenizer_config.json")
    decoder = more.get("added_tokens_decoder") if isinstance(more, dict) else None
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        yield str(entry.get("content") if isinstance(entry, dict) else entry), int(number)
    added = _json(folder / "added_tokens.json")
    yield from ((str(token), int(number)) for token, number in added.items()) if isinstance(added, dict) else ()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a model's folder. Raises CheckpointError if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a model is given by the path of its local folder")
    return folder


def first_line(error: Exception) -> str:
    """The class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
