"""DeepSpeed: expert parallelism, the first step, clipping, and the state of its optimizers.

Importing this module imports neither DeepSpeed nor torch. The functions that read and write state use DeepSpeed's
`deepspeed.utils.safe_*` functions, and do themselves what those leave out.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.compat.patches import patch

if TYPE_CHECKING:
    import torch
    from torch import nn

_patch = partial(patch, "deepspeed")
MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYOUTS = "tests/test_expert_parallel.py::test_ranks_train_as_one_process"
_RESUMED = "tests/test_expert_parallel.py::test_resumed_in_another_layout"

# ------------------------------------------------------------------ starting


@_patch(
    "0.19.8",
    "gap",
    reason="DeepSpeed compiles an all-reduce over shared memory at its first use, which takes a minute and fails "
    "without a C++ compiler. No public setting turns it off",
    reference="`__compatible_ops__` of deepspeed/ops/__init__.py; deepspeed/comm/torch.py",
    test="tests/test_compat.py::test_deepspeed_still_compiles_an_all_reduce",
)
def skip_shared_memory_all_reduce() -> None:
    """Let gloo do the all-reduce instead, so that nothing is compiled."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@_patch(
    "0.19.8",
    "gap",
    reason="Each engine asks whether its optimizer is DeepSpeed's Muon, and for that imports Muon, whose functions are "
    "compiled when they are imported: a fifth of the time in which a rank starts. No setting leaves it out",
    reference="`is_zero_supported_optimizer` of deepspeed/runtime/zero/utils.py; "
    "deepspeed/runtime/zero/muon/original_muon.py",
    test="tests/test_compat.py::test_deepspeed_still_compiles_muon_to_ask_for_it",
)
def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which nothing here trains with, so that torch's compiler is not imported for it."""
    from deepspeed.runtime import compiler

    own = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = own


# ------------------------------------------------------------------ expert parallelism (AutoEP)


@_patch(
    "0.19.8",
    "gap",
    reason="AutoEP looks its models up in a table, and no public function adds a model to it",
    reference="deepspeedai/DeepSpeed#7938; deepspeed/module_inject/auto_ep_presets/registry.py",
    test=_LAYOUTS,
)
def register_expert_preset(name: str, preset: Any, adapter: Any) -> None:
    """Let AutoEP find the mixture-of-experts layers of our own model. See posttrain/model/expert_parallel.py."""
    from deepspeed.module_inject.auto_ep_presets import registry

    registry._PRESET_ADAPTERS[name] = adapter
    registry.PRESET_MODELS[name] = preset


@_patch(
    "0.19.8",
    "gap",
    reason="`deepspeed.initialize` makes AutoEP's layers from fixed classes. Our layers need a router that works in "
    "fp32, replays a choice of experts and records routings, as the native one does",
    reference="deepspeed/module_inject/auto_ep_layer.py; deepspeed/moe/ep_router.py",
    test=_LAYOUTS,
)
def change_expert_layers(model: "nn.Module", layer_class: type, router_class: type) -> list[Any]:
    """Change the class of every layer that AutoEP made, and of its router, in place. Returns the layers."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    for layer in layers:
        layer.__class__ = layer_class
        layer.router.__class__ = router_class
    return layers


@_patch(
    "0.19.8",
    "gap",
    reason="An engine has no public attribute that says whether AutoEP divided its model",
    reference="`expert_parallel_config` of deepspeed/runtime/config.py",
    test=_LAYOUTS,
)
def divides_experts(engine: Any) -> bool:
    """Whether AutoEP divided the experts of an engine's model."""
    config = engine._config.expert_parallel_config
    return config is not None and config.enabled


@_patch(
    "0.19.8",
    "gap",
    reason="Only a private function gives the group of ranks that hold the other experts of a layer",
    reference="deepspeed/utils/groups.py, `_get_expert_parallel_group`",
    test="tests/test_expert_parallel.py::test_export_holds_every_expert",
)
def expert_group(name: str) -> Any:
    """The process group of the ranks that share the experts of a layer. name: the layer's `ep_group_name`."""
    from deepspeed.utils.groups import _get_expert_parallel_group

    return _get_expert_parallel_group(name)


# ------------------------------------------------------------------ steps


@_patch(
    "0.19.8",
    "fault",
    reason="In fp32 and bf16, ZeRO applies gradients that are not finite unless its optimizer is told to check them",
    reference="`check_grad_overflow` of deepspeed/runtime/zero/stage_1_and_2.py and stage3.py",
    test="tests/test_compat.py::test_zero_still_applies_infinite_gradients",
)
def skip_infinite_steps(engine: Any) -> None:
    """Make an engine with ZeRO skip a step whose gradients are not finite."""
    engine.optimizer.check_grad_overflow = True


@_patch(
    "0.19.8",
    "fault",
    reason="In bf16 without ZeRO an engine takes an optimizer step when it is made, so that Adam has its state. Adam "
    "counts it as the first step, which makes the next one a quarter too small, and it decays the fp32 masters",
    reference="deepspeedai/DeepSpeed#5151, deepspeedai/DeepSpeed#5104",
    test="tests/test_compat.py::test_deepspeed_still_takes_a_trial_step",
)
def forget_trial_step(engine: Any) -> None:
    """Undo the optimizer step that the engine took when it was made."""
    optimizer = engine.optimizer
    masters = getattr(optimizer, "fp32_groups", None)
    if masters is None:
        return
    optimizer.optimizer.state.clear()
    for group, weights in zip(masters, optimizer.fp16_groups, strict=True):
        for master, weight in zip(group, weights, strict=True):
            master.data.copy_(weight)


@_patch(
    "0.19.8",
    "fault",
    reason="Without ZeRO each rank clips by the average of the ranks' gradient norms, although the ranks hold "
    "different experts. So the gradients of shared weights are scaled wrongly, and infinite gradients are applied",
    reference="deepspeedai/DeepSpeed#8475, deepspeedai/DeepSpeed#8476",
    test=_LAYOUTS,
)
def clip_by_whole_norm(engine: Any) -> None:
    """Make an engine without ZeRO clip its gradients by the norm of the whole model, and drop them if not finite."""
    engine.clip_fp32_gradients = lambda: _clip_by_whole_norm(engine)


def _clip_by_whole_norm(engine: Any) -> None:
    """Clip by the norm over all parameters, those of other ranks' experts too.

    The gradients of replicated weights are averaged over the ranks already. So the norm lacks only the experts of the
    other ranks in this rank's expert group; their squares are summed by an all-reduce.
    """
    import torch
    import torch.distributed as dist

    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    shared = torch.zeros((), dtype=torch.float64)
    own_experts = torch.zeros((), dtype=torch.float64)
    for parameter in parameters:
        square = parameter.grad.double().square().sum().cpu()
        if getattr(parameter, "allreduce", True):
            shared += square
        else:
            own_experts += square
    groups = {name for parameter in parameters if (name := getattr(parameter, "group_name", None)) is not None}
    for name in sorted(groups):
        device = parameters[0].device
        own_experts = own_experts.to(device)
        dist.all_reduce(own_experts, group=expert_group(name))
        own_experts = own_experts.cpu()
    norm = float((shared + own_experts).sqrt())
    engine._global_grad_norm = norm
    limit = engine.gradient_clipping()
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
    elif limit and norm > limit:
        for parameter in parameters:
            parameter.grad.mul_(limit / norm)


# ------------------------------------------------------------------ state of optimizers


def is_divided(parameter: "nn.Parameter") -> bool:
    """Whether ZeRO-3 divides a parameter among the ranks."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: "nn.Parameter") -> tuple[int, ...]:
    """The shape of a parameter before ZeRO-3 divided it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def inner_optimizer(engine: Any) -> "torch.optim.Optimizer":
    """The torch optimizer that DeepSpeed's optimizer wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


@_patch(
    "0.19.8",
    "gap",
    reason="Adam has no moments before its first step. ZeRO makes those of the first parameter group accessible, and "
    "misses other groups, such as that of the experts. A checkpoint of another layout could not be loaded into them",
    reference="`_lazy_init_hp_params_optimizer_state` of deepspeed/runtime/zero/stage_1_and_2.py; "
    "`fp32_partitioned_groups_flat` of stage3.py",
    test=_RESUMED,
)
def make_moments(engine: Any) -> None:
    """Give the optimizer its moments before its first step, and let DeepSpeed's accessors find them."""
    import torch

    inner = inner_optimizer(engine)
    # Under ZeRO-3 the optimizer has its flat tensors only during a step, so they are taken from the engine.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in flat or [parameter for group in inner.param_groups for parameter in group["params"]]:
        if not inner.state.get(parameter):
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
            }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _master(engine: Any, parameter: "nn.Parameter") -> "torch.Tensor":
    """The tensor that the optimizer changes for an undivided parameter: its fp32 master in bf16, else the parameter."""
    masters = getattr(engine.optimizer, "fp32_groups", ())
    weights = getattr(engine.optimizer, "fp16_groups", ())
    for master_group, weight_group in zip(masters, weights, strict=False):
        for master, weight in zip(master_group, weight_group, strict=True):
            if weight is parameter:
                return master
    return parameter


@_patch(
    "0.19.8",
    "gap",
    reason="`safe_get_full_*` returns None for a parameter that neither ZeRO nor a bf16 optimizer has mapped",
    reference="deepspeed/utils/tensor_fragment.py",
    test=_RESUMED,
)
def read_whole(engine: Any, parameter: "nn.Parameter", moment: str | None) -> "torch.Tensor":
    """The whole fp32 weight of a parameter (moment None), or one of its `MOMENTS`. Collective if it is divided."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not is_divided(parameter) and not hasattr(parameter, "_hp_mapping"):
        master = _master(engine, parameter)
        values = inner_optimizer(engine).state.get(master, {})
        return master.detach() if moment is None else values.get(moment, torch.zeros_like(master))
    if moment is None:
        whole = safe_get_full_fp32_param(parameter)
    else:
        whole = safe_get_full_optimizer_state(parameter, moment)
    assert whole is not None
    return whole.view(whole_shape(parameter))


@_patch(
    "0.19.8",
    "gap",
    reason="`safe_set_full_*` does nothing for a parameter that is not mapped, and does not change the bf16 weight",
    reference="deepspeed/utils/tensor_fragment.py",
    test=_RESUMED,
)
def write_whole(engine: Any, parameter: "nn.Parameter", moment: str | None, *, value: "torch.Tensor") -> None:
    """The inverse of `read_whole`: each rank stores its part of `value`."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if is_divided(parameter):
        _write_divided(parameter, moment, value)
        return
    if hasattr(parameter, "_hp_mapping"):
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
    elif moment is not None:
        inner_optimizer(engine).state[_master(engine, parameter)][moment].copy_(value)
    else:
        _master(engine, parameter).data.copy_(value)
    if moment is None:
        parameter.data.copy_(value)


def _write_divided(parameter: Any, moment: str | None, value: "torch.Tensor") -> None:
    """Store this rank's slice of a parameter that ZeRO-3 divides, padded as DeepSpeed pads it."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    own = parameter.ds_tensor
    group = parameter.ds_process_group
    flat = value.flatten()
    padded = torch.zeros(own.numel() * dist.get_world_size(group), dtype=flat.dtype)
    padded[: flat.numel()] = flat
    mine = padded.narrow(0, own.numel() * dist.get_rank(group), own.numel())
    if moment is not None:
        safe_set_local_optimizer_state(parameter, mine, moment)
        return
    safe_set_local_fp32_param(parameter, mine)
    own.data.copy_(mine.view(own.shape))
