"""LoRA adapters between ranks and folders: write those that a training made, and merge a folder into a whole model."""

import copy
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.files import write_json
from posttrain.model.adapter import BASE, CONFIG, WEIGHTS, base_folder, base_mark, check_adapter
from posttrain.model.adapter_start import adapted_parts
from posttrain.model.folder import read_header
from posttrain.parallel.export import export_model, folder_of_first_rank, is_first_rank, without_adapters
from posttrain.parallel.tensors import adapter_tensors, read_weights

NAME = "default"  # peft's name for a model's only adapter


def export_adapter(
    model: Any, base: str | Path, *, tokenizer: Any, path: str | Path, named: str | Path | None = None
) -> Path:
    """Write the adapters of a `PeftModel` that the ranks hold in parts, in peft's format. Collective.

    They must not be merged yet. base: the folder that they stand on; `peft.PeftModel.from_pretrained` adds them to the
    model in it. named: that folder as the home host names it, for a rank on another host. Returns `path` on every rank,
    once the folder is complete.
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
            config.base_model_name_or_path = str(Path(named or base).expanduser().absolute())
            config.inference_mode = True
            config.save_pretrained(aside)
            write_json(aside / BASE, {"mark": base_mark(base_folder(base))})
            tokenizer.save_pretrained(aside)
    return Path(path)


def merge_adapter(path: str | Path, dtype: str, *, target: str | Path) -> Path:
    """Write the model folder that a folder of adapters stands for. dtype: of the weights; the merge is done in it.

    Adapters that were trained on a text model make a text model, also where their base is multimodal. The tokenizer is
    the adapter's own, else that of the base. Returns `target`. Raises `CheckpointError` for adapters
    that do not fit their base.
    """
    from posttrain.model.load import load_model
    from posttrain.model.tokenizer import load_tokenizer

    check_adapter(path)
    base, images = base_folder(path), bool(adapted_parts(path))
    model = load_model(str(base), "native", dtype, images=images)
    config, architecture = copy.deepcopy(model.config), type(model).__name__.removeprefix("Native")
    adapted = with_adapters(model, path)
    tokenizer = load_tokenizer(path)
    return export_model(
        without_adapters(adapted),
        config,
        architecture,
        tokenizer=tokenizer,
        path=target,
        processor=base if images else None,
    )


def with_adapters(model: Any, path: str | Path, *, trainable: bool = False, dropout: float = 0.0) -> Any:
    """The `PeftModel` of a base that is loaded and of the adapters in a folder. The base is changed in place.

    trainable: train the adapters further, with this dropout; they have the data type of the base then. Raises
    `CheckpointError` for adapters that do not fit their base; `check_adapter` finds most faults before it is loaded.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict

    folder = Path(path).expanduser()
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.lora_dropout = dropout
        adapted = PeftModel.from_pretrained(
            model,
            str(folder),
            config=config,
            is_trainable=trainable,
            autocast_adapter_dtype=not trainable,
            torch_device=str(next(model.parameters()).device),
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: the adapters do not fit {base_folder(folder)}: {lines[0]}") from error
    odd = sorted(get_peft_model_state_dict(adapted).keys() ^ read_header(folder / WEIGHTS).keys())
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise CheckpointError(f"{folder}: {WEIGHTS} and {CONFIG} do not agree on {odd[0]}{more}")
    return adapted
