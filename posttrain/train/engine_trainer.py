"""A TRL trainer on a DeepSpeed engine: its checkpoints are ours, whole tensors of no layout.

Upstream's checkpoint of an expert-parallel engine opens in the same layout alone, and its `save_model` writes this
rank's experts as if they were all. Both are replaced by `posttrain.parallel.state`; export is the stage's.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from posttrain.compat.torch import advance_schedule
from posttrain.errors import StageError
from posttrain.parallel.engine import finish
from posttrain.parallel.export import barrier
from posttrain.parallel.state import load_state, save_state

SCHEDULE = "schedule.json"


class EngineTrainer:
    """Mixed into a `transformers.Trainer` class, before it."""

    model_wrapped: Any

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        engine = require_engine(self.model_wrapped)
        finish(engine)
        if resume_from_checkpoint is not None:
            load_state(engine, resume_from_checkpoint)
            steps = json.loads((Path(resume_from_checkpoint) / SCHEDULE).read_text())["steps"]
            advance_schedule(engine.lr_scheduler, steps)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder of a checkpoint; the weights are written with the optimizer's state."""
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(self.model_wrapped, output_dir)
        if dist.get_rank() == 0:
            steps = self.model_wrapped.lr_scheduler.last_epoch
            (Path(output_dir) / SCHEDULE).write_text(json.dumps({"steps": steps}) + "\n")


def require_engine(wrapped: Any) -> Any:
    """The engine, or `StageError`: an environment variable turns DeepSpeed off, and nothing upstream says so."""
    from deepspeed import DeepSpeedEngine

    if not isinstance(wrapped, DeepSpeedEngine):
        raise StageError(
            f"parallel was asked for, but the model is trained by {type(wrapped).__name__} and not by a DeepSpeed "
            "engine; is ACCELERATE_USE_CPU or ACCELERATE_USE_DEEPSPEED set in the environment?"
        )
    return wrapped


def with_engine(trainer_class: type) -> type:
    """A TRL trainer class whose checkpoints are those of `EngineTrainer`."""
    return type(f"Engine{trainer_class.__name__}", (EngineTrainer, trainer_class), {})


def trainer_config(config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration as a `TrainingArguments` wants it: batch sizes are the trainer's to fill in."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**config, **dict.fromkeys(automatic, "auto")}
