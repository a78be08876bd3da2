"""TRL's trainer on a DeepSpeed engine, with checkpoints that any layout can load.

With expert parallelism, a checkpoint of transformers can be loaded in the same layout only, and `save_model` of
transformers writes the experts of one rank as if they were all. `posttrain.parallel.state` replaces both. Left out: the
export of the trained model, which `run.py` does.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from posttrain.compat.torch import advance_schedule
from posttrain.config.training import Part
from posttrain.errors import StageError
from posttrain.files import write_json
from posttrain.model.vision.parts import parameter_groups
from posttrain.parallel.engine import finish
from posttrain.parallel.export import barrier
from posttrain.parallel.state import load_state, save_state

SCHEDULE = "schedule.json"


class EngineTrainer:
    """Mix-in for a `transformers.Trainer` class, to be named before it among the bases."""

    model: Any
    model_wrapped: Any
    optimizer: Any

    def __init__(
        self, *args: Any, learning_rates: Mapping[Part, float] | None = None, leads_host: bool = False, **kwargs: Any
    ):
        """learning_rates: of parts of the model that have a rate of their own; all must be trained. leads_host: whether
        this rank writes what all ranks of its host read.
        """
        self.leads_host = leads_host
        super().__init__(*args, **kwargs)
        self._learning_rates = dict(learning_rates or {})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Called before the engine is made; `self.optimizer` then only lists the parameters."""
        if self._learning_rates:
            self.optimizer.params = parameter_groups(self.model, self._learning_rates)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

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
        """Make the folder of a checkpoint. `_save_optimizer_and_scheduler` writes the weights into it later."""
        assert output_dir is not None
        if dist.get_rank() == 0:
            os.makedirs(output_dir, exist_ok=True)
        barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(self.model_wrapped, output_dir)
        if dist.get_rank() == 0:
            write_json(Path(output_dir) / SCHEDULE, {"steps": self.model_wrapped.lr_scheduler.last_epoch})

    def _save_rng_state(self, output_dir: str) -> None:
        """Rank 0 writes the states of all random generators: the folder of another rank may be on another host."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)  # type: ignore[misc]
            [own] = Path(folder).iterdir()
            state = (own.name, own.read_bytes())
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(state, found)
        for name, content in found or ():
            (Path(output_dir) / name).write_bytes(content)


def require_engine(wrapped: Any) -> Any:
    """Return the engine, or raise `StageError` if there is none.

    accelerate turns DeepSpeed off without a message if certain environment variables are set.
    """
    from deepspeed import DeepSpeedEngine

    if not isinstance(wrapped, DeepSpeedEngine):
        raise StageError(
            f"the model is trained by {type(wrapped).__name__} and not by a DeepSpeed engine; is ACCELERATE_USE_CPU or "
            "ACCELERATE_USE_DEEPSPEED set in the environment?"
        )
    return wrapped
