"""What a model folder must be before anything of it is loaded. The trainer, the engines and `validate` share it.

Only names, sizes and JSON are read, so it takes milliseconds and needs no torch. Left out: what the tensors are, which
loading checks.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_folder(path: str | Path) -> None:
    """Raise CheckpointError for a folder with two sets of weights, or with a tokenizer that its model does not fit."""
    problems = folder_problems(Path(path).expanduser())
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with the weights and the tokenizer of a folder, each in one line. A part that is missing or cannot
    be read is left to those who look for it."""
    return [*weight_problems(folder), *tokenizer_problems(folder)]


def weight_problems(folder: Path) -> list[str]:
    """Two sets of weights in one folder: transformers prefers model.safetensors, vLLM the index or every file, so that
    one model would be trained and another sampled."""
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
        return []
    others = [name for name in names if name not in listed]
    if others:
        return [f"has weights that {indexes[0]} lists and, beside them, {_some(others)}; {rule}"]
    if SINGLE in listed and len(listed) > 1:
        return [
            f"{indexes[0]} lists {SINGLE} and {len(listed) - 1} more files; some loaders read {SINGLE} alone; {rule}"
        ]
    return []


def _listed(index: Path) -> set[str] | None:
    data = _json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    return set(map(str, names.values())) if isinstance(names, dict) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tokenizer_problems(folder: Path, vocabulary: Mapping[str, int] | None = None) -> list[str]:
    """A token whose id is beyond the embeddings: reading it would fail, or read what is no embedding.

    vocabulary: ids by token, of a tokenizer that is loaded; None: as the folder's files say, which name no tokens of a
    tokenizer.model.
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
        f"its tokenizer gives {token!r} the id {ids[token]}, and so has {ids[token] + 1} ids; its model has {size} "
        f"embeddings (vocab_size in config.json), so {beyond} token{'s' * (beyond > 1)} cannot be read; take the "
        "tokenizer that belongs to the model, or resize the embeddings to it"
    ]


def embeddings(folder: Path) -> int | None:
    """How many tokens the model of a folder has embeddings for, as its config.json says; None where it does not."""
    config = _json(folder / "config.json")
    for part in (config.get("text_config"), config) if isinstance(config, dict) else ():
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int):
            return size
    return None


def _tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of all tokens that the JSON files of a tokenizer name, added ones among them."""
    data = _json(folder / "tokenizer.json")
    data = data if isinstance(data, dict) else {}
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((str(token), number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):  # of (token, score): its place is its id
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
