"""The arguments of TRL's trainers that SFT and DPO share.

With them, trainers log at every step, print nothing, download nothing and send nothing to trackers. The CPU is chosen
by the argument `use_cpu`, and never by the variable ACCELERATE_USE_CPU, which turns DeepSpeed off without a message.
"""

import os
from pathlib import Path
from typing import Any

from posttrain.config.training import GradientCheckpointing, OptimizerConfig, ParallelConfig

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def quiet_environment() -> None:
    """Keep the Hugging Face libraries offline and silent. Call this before TRL is imported."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TQDM_DISABLE", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def common_arguments(
    optimizer: OptimizerConfig,
    *,
    checkpoints: Path,
    epochs: int,
    batch_size: int,
    gradient_accumulation: int,
    gradient_checkpointing: GradientCheckpointing,
    checkpoint_every: int,
    seed: int,
    dtype: str,
) -> dict[str, Any]:
    """The keyword arguments that TRL's `SFTConfig` and `DPOConfig` share, without those of `engine_arguments`.

    batch_size: rows of one forward. dtype: of the model in training.
    """
    import torch

    from posttrain.model.recompute import checkpointing_arguments

    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "gradient_checkpointing": gradient_checkpointing != "none",
        "gradient_checkpointing_kwargs": checkpointing_arguments(gradient_checkpointing),
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": SCHEDULES[optimizer.schedule],
        "warmup_steps": optimizer.warmup_steps,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "steps",
        "save_steps": checkpoint_every,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # if True, a loss that is not finite would be logged as the last finite one
        "use_cpu": not torch.cuda.is_available(),
        "bf16": dtype == "bfloat16",  # DeepSpeed's bf16 mode with fp32 masters, not autocast
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
        # TRL's own balance loss does not work with Llama 4's names; `model.router` adds ours instead.
        "router_aux_loss_coef": 0.0,
    }


def engine_arguments(parallel: ParallelConfig, optimizer: OptimizerConfig, dtype: str, *, model: Any) -> dict[str, Any]:
    """The keyword arguments that make TRL's trainer use a DeepSpeed engine for a model. They work only in a rank."""
    from posttrain.parallel.engine import deepspeed_config

    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = deepspeed_config(parallel, optimizer, dtype)
    if "expert_parallel" in config:  # DeepSpeed does not look into the text config of a multimodal model
        config["expert_parallel"]["top_k"] = model.config.get_text_config().num_experts_per_tok
    return {"deepspeed": {**config, **dict.fromkeys(automatic, "auto")}}  # the trainer fills them in


def prepare_model(model: Any) -> None:
    """Move a model to the GPU, if there is one, and let TRL find the layers of the model."""
    import torch

    from posttrain.compat.transformers import name_base_model

    if torch.cuda.is_available():
        model.to("cuda")
    name_base_model(model)
