"""A short hash of a model folder, by which results that rest on a model are found again.

Only content counts: a folder that was moved or touched keeps its fingerprint. No torch is needed.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from posttrain.errors import CheckpointError
from posttrain.files import content_hash

# Weights, architecture, tokenizer and chat template: all that decides which tokens a model samples.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def model_fingerprint(path: str | Path) -> str:
    """Hash of every byte of a model folder's weights, configuration, tokenizer and chat template.

    Weights are read whole, several files at a time: two models may differ in a few tensors only. Raises
    CheckpointError for what is no model folder.
    """
    folder = Path(path).expanduser()
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()})
    if not (folder / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise CheckpointError(f"{path}: must be a model folder with config.json and *.safetensors")
    with ThreadPoolExecutor(8) as threads:
        hashes = list(threads.map(content_hash, files))
    named = [[file.name, value] for file, value in zip(files, hashes, strict=True)]
    return hashlib.sha256(json.dumps(named).encode("utf-8", "surrogatepass")).hexdigest()[:16]
