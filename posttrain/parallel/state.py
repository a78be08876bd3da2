"""Training state on disk that no layout has a part in: whole tensors by their names.

Weights (fp32 masters where there are any), Adam's two moments and the step are written as the one process would write
them, so a training goes on with another number of ranks, another ZeRO stage or another expert size; in the same layout
it goes on bit for bit. Source of the accessors: DeepSpeed's `deepspeed.utils.safe_*` interface.

    weights-0.safetensors, -1, ...   exp_avg-0, ...   exp_avg_sq-0, ...   state.json {"step", "tensors": name -> shape}

A shard is the same run of tensors in each of the three; rank 0 holds one at a time.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.errors import CheckpointError
from posttrain.parallel.export import SHARD_BYTES, barrier
from posttrain.parallel.tensors import WholeTensor, in_shards, trained_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
VIEWS = ("weights", *MOMENTS)
LIMIT = SHARD_BYTES // 2  # sizes are counted in the model's type, and what is written is fp32


def save_state(engine: Any, folder: str | Path) -> None:
    """Write the state into an existing folder. Collective; rank 0 writes, one view of the model at a time."""
    from safetensors.torch import save_file

    folder = Path(folder)
    items = trained_tensors(engine.module)
    writer = dist.get_rank() == 0
    _make_moments(engine)
    for view in VIEWS:
        for index, shard in enumerate(in_shards(items, LIMIT)):
            held = {}
            for item in shard:
                with torch.no_grad():
                    whole = item.join(lambda parameter, view=view: _read(engine, parameter, view))
                if writer:
                    held[item.name] = whole.detach().to("cpu", copy=True).contiguous()
            if writer:
                save_file(held, folder / f"{view}-{index}.safetensors")
    if writer:
        state = {"step": _adam_step(engine), "tensors": {item.name: list(item.shape) for item in items}}
        (folder / "state.json").write_text(json.dumps(state) + "\n")
    barrier()


def load_state(engine: Any, folder: str | Path) -> None:
    """Continue from `save_state`, of any layout. Raises `CheckpointError` if it is of another model."""
    from safetensors import safe_open

    folder = Path(folder)
    items = trained_tensors(engine.module)
    state = json.loads((folder / "state.json").read_text())
    _check(folder, state["tensors"], items)
    _make_moments(engine)
    by_name = {item.name: item for item in items}
    for view in VIEWS:
        for path in sorted(folder.glob(f"{view}-*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    item = by_name[name]
                    for parameter, part in zip(item.parameters, item.split(file.get_tensor(name)), strict=True):
                        _write(engine, parameter, view, part)
    for values in _inner_optimizer(engine).state.values():
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


def _inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _adam_step(engine: Any) -> int:
    steps = [int(values["step"]) for values in _inner_optimizer(engine).state.values() if "step" in values]
    return max(steps, default=0)


def _like_step(old: Any, step: int) -> Any:
    return torch.full_like(old, float(step)) if isinstance(old, torch.Tensor) else step


def _make_moments(engine: Any) -> None:
    """Let the optimizer have its state before its first step, so that it can be filled."""
    inner = _inner_optimizer(engine)
    # ZeRO-3 hands its flat tensors to the optimizer only while it steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in flat or [parameter for group in inner.param_groups for parameter in group["params"]]:
        if not inner.state.get(parameter):
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
            }
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let the accessors find the moments of every group. DeepSpeed links them after the step of the first group, when
    the others, such as that of the experts, have none yet."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _held(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """What the optimizer moves for a parameter that nothing divides: its fp32 master in bf16, or itself."""
    optimizer = engine.optimizer
    for masters, weights in zip(
        getattr(optimizer, "fp32_groups", ()), getattr(optimizer, "fp16_groups", ()), strict=False
    ):
        for master, weight in zip(masters, weights, strict=True):
            if weight is parameter:
                return master
    return parameter


def _read(engine: Any, parameter: nn.Parameter, view: str) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    key = None if view == "weights" else view
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        held = _held(engine, parameter)
        values = _inner_optimizer(engine).state.get(held, {})
        return held.detach() if key is None else values.get(key, torch.zeros_like(held))
    if key is None:
        whole = safe_get_full_fp32_param(parameter)
    else:
        whole = safe_get_full_optimizer_state(parameter, key)
    assert whole is not None
    return whole.view(getattr(parameter, "ds_shape", parameter.shape))


def _write(engine: Any, parameter: nn.Parameter, view: str, part: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    key = None if view == "weights" else view
    if hasattr(parameter, "ds_id"):
        _write_divided(parameter, key, part)
        return
    if hasattr(parameter, "_hp_mapping"):
        if key is None:
            safe_set_full_fp32_param(parameter, part)
        else:
            safe_set_full_optimizer_state(parameter, part, key)
    elif key is not None:
        _inner_optimizer(engine).state[_held(engine, parameter)][key].copy_(part)
    else:
        _held(engine, parameter).data.copy_(part)
    if key is None:
        parameter.data.copy_(part)


def _write_divided(parameter: Any, key: str | None, part: torch.Tensor) -> None:
    """This rank's slice of a parameter that ZeRO-3 divides, padded as DeepSpeed pads it."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    own = parameter.ds_tensor
    group = parameter.ds_process_group
    flat = part.flatten()
    padded = torch.zeros(own.numel() * dist.get_world_size(group), dtype=flat.dtype)
    padded[: flat.numel()] = flat
    mine = padded.narrow(0, own.numel() * dist.get_rank(group), own.numel())
    if key is not None:
        safe_set_local_optimizer_state(parameter, mine, key)
        return
    safe_set_local_fp32_param(parameter, mine)
    own.data.copy_(mine.view(own.shape))
