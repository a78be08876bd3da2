"""Read and write model folders in the Hugging Face layout (safetensors, config.json, tokenizer).

Loading checks the whole folder and reports its faults in one message. A missing weight is an error; transformers alone
would fill it with random numbers.
Left out: downloading (give a local folder), pickle checkpoints (they can run code), sharded training state.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from posttrain.config.models import ModelConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import CheckpointError
from posttrain.files import replacing
from posttrain.model.adapter import base_folder, is_adapter
from posttrain.model.folder import INDEX as _INDEX
from posttrain.model.folder import existing_folder, first_line, weight_problems
from posttrain.model.native import NativeLlama4ForCausalLM
from posttrain.model.router_keys import LLAMA4, check_router
from posttrain.model.router_stats import RouterLossWeights
from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("float32", "bfloat16", "float16")
# In a folder of the multimodal Llama 4 the text model's tensors have a prefix, and the image tensors are not needed.
_TEXT_MODEL = {r"^language_model\.": ""}
_IMAGE_TENSORS = ("vision_model.", "multi_modal_projector.")
_SHOWN = 5


def load_model(
    path: str | os.PathLike,
    implementation: Literal["native", "transformers"] = "native",
    dtype: str = "float32",
    *,
    images: bool = False,
) -> PreTrainedModel:
    """Load the causal language model of a folder onto the CPU, in evaluation mode.

    Args:
        path: folder with config.json and model*.safetensors.
        implementation: for Llama 4 folders, `native` (NativeLlama4ForCausalLM) or `transformers`; other architectures
            always come from transformers.
        dtype: float32, bfloat16 or float16; weights in another type are converted.
        images: load the vision encoder and the projector of a multimodal Llama 4 too. False loads its text model alone.

    Raises:
        CheckpointError: `images` is set, and the model has no vision encoder; the folder is missing; config.json is
            missing or unreadable; there are no safetensors (or only a pickle), or two sets of weights; a file is
            corrupt, or listed in the index but missing; tensors are missing, unknown or of the wrong shape.
        ValueError: implementation or dtype is unknown.
    """
    if implementation not in ("native", "transformers"):
        raise ValueError(f"implementation is {implementation!r}; it must be native or transformers")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    folder = existing_folder(path)
    config = read_config(folder)
    _check_weight_files(folder)
    arguments: dict[str, Any] = {"config": config, "dtype": getattr(torch, dtype)}
    model_class: Any = AutoModelForCausalLM
    if images:
        _check_has_vision(folder, config)
        model_class = NativeLlama4ForConditionalGeneration
        if implementation == "transformers":
            model_class = Llama4ForConditionalGeneration
    elif config.model_type in LLAMA4:
        model_class = NativeLlama4ForCausalLM if implementation == "native" else Llama4ForCausalLM
        arguments["config"] = config.get_text_config()
        if config.model_type == "llama4":
            arguments["key_mapping"] = _TEXT_MODEL
    return _read(model_class, folder, arguments).eval()


def load_policy(model: ModelConfig, *, images: bool = False) -> PreTrainedModel:
    """Load the model that a stage trains, with the losses on routers that `model.router` asks for.

    images: as for `load_model`.

    For a folder of adapters that is their base, to which `posttrain.parallel.adapters.with_adapters` adds them.

    Raises what `load_model` and `check_router` raise.
    """
    check_router(model)
    loaded = load_model(base_folder(model.path), model.implementation, model.dtype, images=images)
    text = loaded.language_model if isinstance(loaded, NativeLlama4ForConditionalGeneration) else loaded
    if isinstance(text, NativeLlama4ForCausalLM):
        text.model.router_loss_weights = RouterLossWeights(model.router.balance_loss, model.router.z_loss)
    return loaded


def save_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model folder under a temporary name, then rename it to `path`: a reader sees all of it or nothing.

    Tensors keep their dtype. An older folder at `path` is replaced.

    Args:
        state_dict: weights to write instead of the model's own, such as weights gathered from several processes.

    Returns:
        `path` as a Path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as aside:
        with _quiet():
            model.save_pretrained(aside, state_dict=None if state_dict is None else dict(state_dict))
        tokenizer.save_pretrained(aside)
    return target


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's config. Raises CheckpointError if config.json is missing or cannot be read."""
    path = folder / "config.json"
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder}: holds adapters and no whole model; a stage merges them, and so does posttrain merge"
        )
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder must hold one")
    try:
        json.loads(path.read_text())
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from error


def _check_has_vision(folder: Path, config: PreTrainedConfig) -> None:
    if config.model_type != "llama4":
        raise CheckpointError(
            f"{folder}: a model of type {config.model_type}, which takes no images here; images need a multimodal "
            "Llama 4 (model_type llama4 in config.json)"
        )


def _check_weight_files(folder: Path) -> None:
    """Raise CheckpointError unless the folder has one set of weights and every file of it opens.

    Only the headers of the files are read. The error names the file.
    """
    if problems := weight_problems(folder):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    if not any((folder / name).is_file() for name in (_INDEX, "model.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder}: only a pickle checkpoint ({pickles[0]}), which can run code when it is read; "
                "convert it to safetensors"
            )
        raise CheckpointError(f"{folder}: no model.safetensors and no {_INDEX}; a model folder must hold weights")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: corrupt or truncated safetensors: {first_line(error)}") from error


def _read(model_class: Any, folder: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, all of them in one error
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:
        raise CheckpointError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    ignored = () if hasattr(model, "vision_model") else _IMAGE_TENSORS
    unknown = sorted(name for name in info["unexpected_keys"] if not name.startswith(ignored))
    shapes = [f"{name} is {list(got)}, must be {list(want)}" for name, got, want in sorted(info["mismatched_keys"])]
    problems = [
        *_problem("missing tensors", sorted(info["missing_keys"])),
        *_problem("unknown tensors", unknown),
        *_problem("tensors of another shape than config.json says", shapes),
        *_problem("errors", [str(message) for message in info["error_msgs"]]),
    ]
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    return model


def _problem(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {title}: {', '.join(names[:_SHOWN])}{more}"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports. Faults of a folder are raised as errors instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
