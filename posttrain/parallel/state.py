"""Save and load training state that does not depend on the layout: whole tensors by their names.

Weights (the fp32 masters, if there are any), Adam's two moments and the step are written as a single process would
write them. So a training can continue with another number of ranks, another ZeRO stage or another `parallel.expert`. In
the same layout it continues bit for bit. posttrain/compat/deepspeed.py reads and writes DeepSpeed's optimizers.

    weights-0.safetensors, -1, ...   exp_avg-0, ...   exp_avg_sq-0, ...   state.json {"step", "tensors": name -> shape}

Shard number i holds the same tensors in each of the three views. Rank 0 holds one shard at a time.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posttrain.compat.deepspeed import MOMENTS, inner_optimizer, make_moments, read_whole, write_whole
from posttrain.errors import CheckpointError
from posttrain.parallel.export import SHARD_BYTES, barrier
from posttrain.parallel.tensors import WholeTensor, in_shards, trained_tensors

# What is written of each tensor, and the moment of Adam that it is; None: the value itself.
VIEWS: dict[str, str | None] = {"weights": None, **{name: name for name in MOMENTS}}
LIMIT = SHARD_BYTES // 2  # half, because sizes are counted in the model's dtype (bf16) and written in fp32


def save_state(engine: Any, folder: str | Path) -> None:
    """Write the state into an existing folder, one view after the other. Collective; only rank 0 writes."""
    from safetensors.torch import save_file

    folder = Path(folder)
    items = trained_tensors(engine.module)
    writer = dist.get_rank() == 0
    make_moments(engine)
    for view, moment in VIEWS.items():
        for index, shard in enumerate(in_shards(items, LIMIT)):
            values = {}
            for item in shard:
                with torch.no_grad():
                    whole = item.join(lambda parameter, moment=moment: read_whole(engine, parameter, moment))
                if writer:
                    values[item.name] = whole.detach().to("cpu", copy=True).contiguous()
            if writer:
                save_file(values, folder / f"{view}-{index}.safetensors")
    if writer:
        state = {"step": _adam_step(engine), "tensors": {item.name: list(item.shape) for item in items}}
        (folder / "state.json").write_text(json.dumps(state) + "\n")
    barrier()


def load_state(engine: Any, folder: str | Path) -> None:
    """Load what `save_state` wrote in any layout. Collective. Raises `CheckpointError` if the tensors differ."""
    from safetensors import safe_open

    folder = Path(folder)
    items = trained_tensors(engine.module)
    state = json.loads((folder / "state.json").read_text())
    _check(folder, state["tensors"], items)
    make_moments(engine)
    by_name = {item.name: item for item in items}
    for view, moment in VIEWS.items():
        for path in sorted(folder.glob(f"{view}-*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    item = by_name[name]
                    for parameter, part in zip(item.parameters, item.split(file.get_tensor(name)), strict=True):
                        write_whole(engine, parameter, moment, value=part)
    for values in inner_optimizer(engine).state.values():
        if "step" in values:
            values["step"] = _like_step(values["step"], state["step"])
    barrier()


def _check(folder: Path, saved: dict[str, list[int]], items: list[WholeTensor]) -> None:
    wanted = {item.name: list(item.shape) for item in items}
    if saved != wanted:
        odd = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{folder}: {len(odd)} tensors are not those of this training, such as {odd[0]}: "
            f"{saved.get(odd[0], 'absent')} in the checkpoint, {wanted.get(odd[0], 'absent')} in the model"
        )


def _adam_step(engine: Any) -> int:
    steps = [int(values["step"]) for values in inner_optimizer(engine).state.values() if "step" in values]
    return max(steps, default=0)


def _like_step(old: Any, step: int) -> Any:
    return torch.full_like(old, float(step)) if isinstance(old, torch.Tensor) else step
