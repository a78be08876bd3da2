"""A DeepSpeed engine around a model, as `parallel` in a config asks for it.

One rank or many, one code path. What upstream leaves out is made good in `finish`: the layers that AutoEP puts into the
model become ours, gradients that are not finite are never applied, and without ZeRO they are clipped by the norm of the
whole model (upstream would clip each rank by the norm of its own experts, and the ranks would drift apart).
"""

import math
import os
import shutil
from importlib.util import find_spec
from typing import Any

from posttrain.config.shared import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from posttrain.errors import ConfigError

LOOPBACK = "127.0.0.1"


def join_ranks(rank: int, world: int, address: str, port: int) -> None:
    """Make this process rank `rank` of `world`; returns when all have met at `address`. One GPU a process, or none."""
    import torch

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        # Each process sees its own GPU only, as number 0.
        "LOCAL_RANK": "0",
    }  # fmt: skip
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it turns DeepSpeed off without a word
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if address == LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    deepspeed = quiet_deepspeed()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def quiet_deepspeed() -> Any:
    """Import DeepSpeed: it says little, and compiles no kernel for shared memory between ranks (gloo does the same)."""
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(parallel: ParallelConfig, optimizer: OptimizerConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Every default of DeepSpeed that would change the training is set here."""
    zero: dict[str, Any] = {"stage": parallel.zero, "overlap_comm": False}
    if parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0  # every parameter in one way: divided
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the caller says where a step ends
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": 1e-8,
                "weight_decay": optimizer.weight_decay,
                # DeepSpeed's own kernels are compiled at run time; its CPU Adam is needed where state is offloaded.
                "torch_adam": parallel.offload == "none",
            },
        },
        "steps_per_print": 1 << 40,
    }
    if parallel.expert > 1:
        from posttrain.model.expert_parallel import PRESET, register_preset

        register_preset()
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": parallel.expert,
            "preset_model": PRESET,
            # One product, as in one process: two would round the gradient of their input twice.
            "gate_up_impl": "fused",
        }
    return config


def start_engine(module: Any, parallel: ParallelConfig, optimizer: OptimizerConfig, dtype: str) -> Any:
    """A `DeepSpeedEngine` around `module`, finished. The ranks must have met, and each hold the same weights."""
    return build_engine(module, deepspeed_config(parallel, optimizer, dtype))


def build_engine(module: Any, config: dict[str, Any]) -> Any:
    """As `start_engine`, from DeepSpeed's own configuration."""
    deepspeed = quiet_deepspeed()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return finish(deepspeed.initialize(model=module, model_parameters=trained, config=config)[0])


def engine_report(engine: Any, parallel: ParallelConfig | None) -> dict[str, Any]:
    """For a stage's figures: the class of what trained, and its layout; nothing for a plain process."""
    return {} if parallel is None else {"engine": type(engine).__name__, **parallel.model_dump()}


def finish(engine: Any) -> Any:
    """Make good what upstream leaves out; see the module's text. Returns the engine."""
    if engine._config.expert_parallel_config is not None and engine._config.expert_parallel_config.enabled:
        from posttrain.model.expert_parallel import adopt

        adopt(engine.module)
    if engine.zero_optimization():
        engine.optimizer.check_grad_overflow = True
    else:
        engine.clip_fp32_gradients = lambda: _clip_by_whole_norm(engine)
        _forget_trial_step(engine.optimizer)
    return engine


def _forget_trial_step(optimizer: Any) -> None:
    """Undo the step that DeepSpeed takes, in bf16 without ZeRO, to have Adam's state made: it counts as Adam's first,
    so that the next is a quarter too small, and it decays the fp32 masters."""
    masters = getattr(optimizer, "fp32_groups", None)
    if masters is None:
        return
    optimizer.optimizer.state.clear()
    for group, weights in zip(masters, optimizer.fp16_groups, strict=True):
        for master, weight in zip(group, weights, strict=True):
            master.data.copy_(weight)


def _clip_by_whole_norm(engine: Any) -> None:
    """Scale all gradients by the norm over every expert of every rank; drop them all if it is not finite.

    Gradients are averaged over their replicas already. Experts of the other ranks of this rank's expert group are the
    only ones that are missing here.
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
    groups = {getattr(parameter, "group_name", None) for parameter in parameters} - {None}
    for name in groups:
        from deepspeed.utils.groups import _get_expert_parallel_group

        device = parameters[0].device
        own_experts = own_experts.to(device)
        dist.all_reduce(own_experts, group=_get_expert_parallel_group(name))
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


def check_parallel(parallel: ParallelConfig | None, model: ModelConfig, lora: LoraConfig | None) -> None:
    """Raise `ConfigError` for a layout that this model, or upstream, cannot be trained in. Reads config.json only."""
    if parallel is None:
        return
    if parallel.offload == "optimizer" and not _can_offload():
        rule = "DeepSpeed's CPU Adam is compiled at its first use, which needs a C++ compiler and ninja; install them"
        raise ConfigError("parallel.offload", [f"got optimizer: {rule}, or set parallel.offload: none"])
    problems = []
    if parallel.expert > 1:
        problems += _expert_problems(parallel.expert, model)
        problems += _lora_problems(parallel, lora) if lora is not None else []
    if problems:
        raise ConfigError("parallel.expert", [f"got {parallel.expert}{problem}" for problem in problems])


def _can_offload() -> bool:
    tools = (os.environ.get("CXX", "c++"), "ninja")
    return all(map(shutil.which, tools)) or find_spec("deepspeed.ops.adam.cpu_adam_op") is not None


def _lora_problems(parallel: ParallelConfig, lora: LoraConfig) -> list[str]:
    """What DeepSpeed cannot do with adapters where experts are divided; each goes on after "got 2"."""
    problems = []
    if lora.target_parameters:
        problems.append(
            " with lora.target_parameters: AutoEP does not find experts that carry adapters; set parallel.expert: 1, "
            "or leave target_parameters empty"
        )
    if parallel.zero in (1, 2):
        problems.append(
            f" with lora and parallel.zero {parallel.zero}: DeepSpeed's ZeRO 1 and 2 do not start where the divided "
            "experts are frozen; set parallel.zero: 0 or 3, or parallel.expert: 1"
        )
    return problems


def _expert_problems(expert: int, model: ModelConfig) -> list[str]:
    """What is wrong with dividing a model's experts among `expert` ranks; each goes on after "got 2"."""
    from transformers import AutoConfig, Llama4Config, Llama4TextConfig

    config = AutoConfig.from_pretrained(model.path, local_files_only=True)
    if not isinstance(config, Llama4Config | Llama4TextConfig) or model.implementation != "native":
        return [
            f" for a {config.model_type} model in the {model.implementation} implementation; expert parallelism is for "
            "Llama 4 with model.implementation: native"
        ]
    text: Any = config.get_text_config()
    problems = []
    if not text.moe_layers:
        problems.append(", but this model has no mixture-of-experts layer")
    elif text.num_local_experts % expert:
        problems.append(f", which does not divide the model's {text.num_local_experts} experts")
    if text.hidden_act != "silu":
        problems.append(f", but only experts with hidden_act silu can be divided, not {text.hidden_act}")
    return problems
