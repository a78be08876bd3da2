"""Make a DeepSpeed engine of a model, in the layout that the section `parallel` of a config asks for.

One rank takes the same path as many. `finish` makes every engine safe to train with: the layers that AutoEP puts into
the model become ours, gradients that are not finite are never applied, and without ZeRO gradients are clipped by the
norm of the whole model. posttrain/compat/deepspeed.py explains what DeepSpeed does wrong there, and mends it.
"""

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from posttrain.compat import deepspeed as compat
from posttrain.config.models import ModelConfig
from posttrain.config.training import AdaptersConfig, OptimizerConfig, ParallelConfig, Part
from posttrain.errors import ConfigError
from posttrain.model.adapter import base_folder

LOOPBACK = "127.0.0.1"


def join_ranks(rank: int, world: int, meeting: tuple[str, int]) -> None:
    """Make this process rank `rank` of `world`. Returns when all ranks have joined.

    meeting: address and port of rank 0. Collectives use NCCL if the process sees a GPU, which must be its only one, and
    gloo otherwise.
    """
    import torch

    address, port = meeting

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        # Each process sees no other GPU than its own, as number 0.
        "LOCAL_RANK": "0",
    }  # fmt: skip
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would turn DeepSpeed off without a message
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if address == LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    deepspeed = quiet_deepspeed()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def quiet_deepspeed() -> Any:
    """Import DeepSpeed so that it logs errors only.

    It does not compile its kernel for all-reduce over shared memory, as gloo does the same work, nor its Muon.
    """
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    compat.skip_shared_memory_all_reduce()
    compat.import_muon_uncompiled()
    return deepspeed


def deepspeed_config(parallel: ParallelConfig, optimizer: OptimizerConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict. It sets every value whose default in DeepSpeed would change the training."""
    zero: dict[str, Any] = {"stage": parallel.zero, "overlap_comm": False}
    if parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0  # divide small parameters too, so that there is one case
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the caller tells the engine where a step ends
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
                # DeepSpeed's own Adam is compiled at run time, so torch's is used, except if the state is offloaded:
                # that needs DeepSpeed's CPU Adam.
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
            # Multiply by the gate and up weights in one fused product, as a single process does: with two products
            # the gradient of their input would be rounded twice.
            "gate_up_impl": "fused",
        }
    return config


def start_engine(
    module: Any,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    *,
    dtype: str,
    learning_rates: Mapping[Part, float] | None = None,
) -> Any:
    """A `DeepSpeedEngine` around `module`, made safe by `finish`.

    Call it after `join_ranks`, on every rank and with the same weights. learning_rates: of parts of a multimodal model
    that have a rate of their own.
    """
    return build_engine(module, deepspeed_config(parallel, optimizer, dtype), learning_rates)


def build_engine(module: Any, config: dict[str, Any], learning_rates: Mapping[Part, float] | None = None) -> Any:
    """As `start_engine`, from a configuration of DeepSpeed, as `deepspeed_config` gives it."""
    from posttrain.model.vision.parts import parameter_groups

    deepspeed = quiet_deepspeed()
    trained: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if learning_rates:
        trained = parameter_groups(module, learning_rates)
    return finish(deepspeed.initialize(model=module, model_parameters=trained, config=config)[0])


def engine_report(engine: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """Figures for a stage's report: the class of the engine, and the layout."""
    return {"engine": type(engine).__name__, **parallel.model_dump()}


def finish(engine: Any) -> Any:
    """Make an engine safe to train with, as the module's docstring says. Returns the engine."""
    if compat.divides_experts(engine):
        from posttrain.model.expert_parallel import adopt

        adopt(engine.module)
    if engine.zero_optimization():
        compat.skip_infinite_steps(engine)
    else:
        compat.clip_by_whole_norm(engine)
        compat.forget_trial_step(engine)
    return engine


def check_parallel(parallel: ParallelConfig, model: ModelConfig, lora: AdaptersConfig | None) -> None:
    """Raise `ConfigError` for a layout in which this model cannot be trained, by its sizes or by limits of DeepSpeed.

    Of the model only config.json is read.
    """
    if parallel.offload == "optimizer" and not _can_offload():
        rule = "DeepSpeed's CPU Adam is compiled at its first use, which needs a C++ compiler and ninja; install them"
        raise ConfigError("parallel.offload", [f"got optimizer: {rule}, or set parallel.offload: none"])
    problems = []
    if parallel.expert > 1:
        problems += _expert_problems(parallel.expert, model)
        problems += lora_problems(parallel, lora) if lora is not None else []
    if problems:
        raise ConfigError("parallel.expert", [f"got {parallel.expert}{problem}" for problem in problems])


def _can_offload() -> bool:
    tools = (os.environ.get("CXX", "c++"), "ninja")
    return all(map(shutil.which, tools)) or find_spec("deepspeed.ops.adam.cpu_adam_op") is not None


def lora_problems(parallel: ParallelConfig, lora: AdaptersConfig) -> list[str]:
    """What DeepSpeed cannot do with adapters if experts are divided. Each text continues a message, "got 2"."""
    if parallel.expert == 1:
        return []
    problems = []
    if lora.target_parameters:
        problems.append(
            " with lora.target_parameters: AutoEP does not find experts that carry adapters; set parallel.expert: 1, "
            "or leave target_parameters empty"
        )
    if parallel.zero in (1, 2):
        problems.append(
            f" with lora and parallel.zero {parallel.zero}: DeepSpeed's ZeRO 1 and 2 do not start if the divided "
            "experts are frozen; set parallel.zero: 0 or 3, or parallel.expert: 1"
        )
    return problems


def _expert_problems(expert: int, model: ModelConfig) -> list[str]:
    """Why a model's experts cannot be divided among `expert` ranks. Each text continues a message, "got 2"."""
    from transformers import AutoConfig, Llama4Config, Llama4TextConfig

    config = AutoConfig.from_pretrained(base_folder(model.path), local_files_only=True)
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
