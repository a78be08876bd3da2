"""LoRA adapters between ranks and folders: write those that a training made, and merge a folder into a whole model."""

import copy
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.model.adapter import CONFIG, WEIGHTS, adapter_problems, base_folder
from posttrain.model.folder import read_header
from posttrain.parallel.export import export_model, folder_of_first_rank, is_first_rank, without_adapters
from posttrain.parallel.tensors import adapter_tensors, read_weights

NAME = "default"  # peft's name for a model's only adapter


def export_adapter(model: Any, base: str | Path, *, tokenizer: Any, path: str | Path) -> Path:
    """Write the adapters of a `PeftModel` that the ranks hold in parts, in peft's format. Collective.

    They must not be merged yet. base: the folder that they stand on; `peft.PeftModel.from_pretrained` adds them to the
    model in it. Returns `path` on every rank, once the folder is complete.
    """
    from safetensors.torch import save_file

    with folder_of_first_rank(path) as aside:
        held = {
            f"base_model.model.{item.name.replace(f'.{NAME}', '')}": value.detach().to("cpu", copy=True).contiguous()
            for item, value in read_weights(adapter_tensors(model))
            if is_first_rank()
        }
        if is_first_rank():
            save_file(held, aside / WEIGHTS, metadata={"format": "pt"})
            config = copy.deepcopy(model.peft_config[NAME])
            config.base_model_name_or_path = str(Path(base).expanduser().absolute())
            config.inference_mode = True
            config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return Path(path)


def merge_adapter(path: str | Path, dtype: str, *, target: str | Path) -> Path:
    """Write the model folder that a folder of adapters stands for. dtype: of the weights; the merge is done in it.

    The tokenizer is the adapter's own, else that of the base. Returns `target`. Raises `CheckpointError` for adapters
    that do not fit their base.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    from posttrain.model.load import load_model
    from posttrain.model.tokenizer import load_tokenizer

    folder, base = Path(path).expanduser(), base_folder(path)
    if problems := adapter_problems(folder):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    model = load_model(str(base), "native", dtype)
    config, architecture = copy.deepcopy(model.config), type(model).__name__.removeprefix("Native")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: the adapters do not fit {base}: {lines[0]}") from error
    odd = sorted(get_peft_model_state_dict(adapted).keys() ^ read_header(folder / WEIGHTS).keys())
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise CheckpointError(f"{folder}: {WEIGHTS} and {CONFIG} do not agree on {odd[0]}{more}")
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder if has_own else base))
    return export_model(without_adapters(adapted), config, architecture, tokenizer=tokenizer, path=target)
