"""Write a model folder from the whole tensors of an engine, shard by shard.

Reading a tensor needs every rank. Only rank 0 writes; beside its own part of the model it holds at most one shard.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.data.ends import end_token_ids
from posttrain.data.tokenizer import Tokenizer
from posttrain.files import replacing
from posttrain.parallel.tensors import WholeTensor, gathered, in_shards, read_weights, whole_tensors

SHARD_BYTES = 4 << 30
WEIGHTS = "model.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def export_model(
    model: nn.Module,
    config: Any,
    architecture: str,
    *,
    tokenizer: Tokenizer,
    path: str | Path,
    processor: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a Hugging Face folder with every weight of a model that the ranks hold in parts. Collective.

    model: an engine's module. config: its transformers config. architecture: name of the class for config.json, such as
    "Llama4ForCausalLM". processor: a model folder whose files of a processor of images belong to the new one, too.
    Returns `path` on every rank, once the folder is complete.
    """
    shards = in_shards(whole_tensors(model), shard_bytes)
    names = _shard_names(len(shards))
    with folder_of_first_rank(path) as aside:
        for name, shard in zip(names, shards, strict=True):
            held = {
                item.name: value.detach().to("cpu", copy=True).contiguous()
                for item, value in read_weights(shard)
                if is_first_rank()
            }
            if held:
                _save(held, aside / name)
        if is_first_rank():
            generation = getattr(model, "generation_config", None)
            _write_rest(
                aside,
                config,
                generation,
                architecture=architecture,
                tokenizer=tokenizer,
                shards=dict(zip(names, shards, strict=True)),
            )
            for file in (Path(processor) / name for name in PROCESSOR_FILES if processor is not None):
                if file.exists():
                    shutil.copy(file, aside)
    return Path(path)


@contextmanager
def folder_of_first_rank(path: str | Path) -> Iterator[Path]:
    """Write a folder whole or not at all, from work that needs all ranks. Collective.

    On rank 0 the block is given a new, empty folder, and may write to it. When the block ends the folder is moved to
    `path`. After an error on rank 0, or a crash, an older folder at `path` is unchanged. Other ranks are given `path`
    and must not write.
    """
    target = Path(path)
    if is_first_rank():
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as aside:
            aside.mkdir()
            yield aside
    else:
        yield target
    barrier()


def without_adapters(model: Any) -> Any:
    """Add every adapter into the weight that it adapts, and return the model itself. Collective.

    A model without adapters is returned as it is. Training cannot continue afterwards.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        return model
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            with torch.no_grad(), gathered(tuple(module.parameters()), changed=True):
                module.merge()
    return model.get_base_model()


def barrier() -> None:
    """Wait until every rank has called this. In a process that is not a rank it does nothing."""
    if dist.is_initialized():
        dist.barrier()


def is_first_rank() -> bool:
    """True on rank 0, and in a process that is not a rank."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _write_rest(
    folder: Path,
    config: Any,
    generation: Any,
    *,
    architecture: str,
    tokenizer: Tokenizer,
    shards: dict[str, list[WholeTensor]],
) -> None:
    own = copy.deepcopy(config)
    own.architectures = [architecture]
    own.dtype = next(iter(shards.values()))[0].dtype
    own.save_pretrained(folder)
    if generation is not None:
        # Trained replies end with these tokens, so whoever samples from the folder must stop at them too.
        named = _as_list(generation.eos_token_id)
        missing = [token for token in end_token_ids(tokenizer) if token not in named]
        stopping = copy.deepcopy(generation)
        stopping.eos_token_id = [*named, *missing] if missing else generation.eos_token_id
        stopping.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(item.num_bytes for shard in shards.values() for item in shard)},
            "weight_map": {item.name: name for name, shard in shards.items() for item in shard},
        }
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
