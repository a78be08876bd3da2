"""Checks of a model folder that a config names: is it whole, and can it be trained. No weights are read."""

import json
from pathlib import Path

from posttrain.config.models import ModelConfig, ServedModelConfig
from posttrain.data.hub import is_name
from posttrain.model.adapter import adapter_problems, base_folder, is_adapter
from posttrain.model.folder import folder_problems, quantization
from posttrain.model.tensors import missing_tensor_problems

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def model_folder_problems(path: str) -> list[str]:
    """One line for each problem of a model folder.

    A model folder needs a config.json, exactly one set of safetensors files with every tensor of the model, and a
    tokenizer that fits the embeddings.
    A folder of adapters is checked together with its base.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file; give the folder it lies in" if folder.exists() else "no such folder"
        return [f"got {path!r}: {what}{'' if folder.exists() else _download(path)}"]
    if is_adapter(folder):
        own = [f"got {path!r}: {problem}" for problem in adapter_problems(folder)]
        return own or [f"got {path!r}: its base: {line}" for line in model_folder_problems(str(base_folder(folder)))]
    problems = []
    config = folder / "config.json"
    if not config.is_file():
        problems.append(f"got {path!r}: no config.json in this folder; it must be a Hugging Face model folder")
    else:
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"got {path!r}: config.json cannot be read: {error}")
    if not any(folder.glob("*.safetensors")):
        problems.append(f"got {path!r}: no *.safetensors in this folder; pickled weights are not loaded")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        problems.append(f"got {path!r}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); a model folder must hold one")
    faults = folder_problems(folder) or missing_tensor_problems(folder)
    return problems + [f"got {path!r}: this folder {fault}" for fault in faults]


def _download(path: str) -> str:
    """The advice for a path that looks like the name of a model on a hub; "" for any other path."""
    if not is_name(path):
        return ""
    folder = f"models/{path.rpartition('/')[2]}"
    return f"; models are not downloaded by name: hf download {path} --local-dir {folder}, then give {folder}"


def quantized_problems(model: ServedModelConfig) -> list[str]:
    """A line about a model that is to be trained although its weights are quantized; none for any other model."""
    sign = quantization(base_folder(model.path)) if isinstance(model, ModelConfig) else None
    if sign is None:
        return []
    what = f"its weights are quantized ({sign}), and such weights are not trained"
    return [f"got {model.path!r}: {what}; give the model that it was made from, or a copy saved in bfloat16"]
