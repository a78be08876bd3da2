"""The trainer of a stage, which is started early and, if it is lost, again; and the model that its engines load."""

from pathlib import Path
from typing import TypeVar

from posttrain.context import StageContext
from posttrain.errors import TrainerLostError
from posttrain.model.adapter import MERGED
from posttrain.model.adapter_start import continues
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.config import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)


def with_whole_policy(config: C, context: StageContext) -> C:
    """The config for engines and reference: where adapters are continued, it names the whole model that they stand for.

    The model is written into the stage's folder, and used again by a stage that was interrupted.
    """
    if not continues(config.model):
        return config
    target = context.dir / MERGED / "model"
    if not target.is_dir():
        from posttrain.parallel.adapters import merge_adapter

        context.phase(f"merging adapters into their base for the engines: {config.model.path}")
        merge_adapter(config.model.path, config.model.dtype, target=target)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(target)})})


class TrainerStarts:
    """Starts a trainer, and another one up to `trainer_restarts` times. Ray must be initialised.

    store: the file of the pictures that the prompts show; None for prompts of text. left: how many more times it may be
    started again.
    """

    def __init__(self, config: TrainingConfig, context: StageContext, store: Path | None = None):
        self._config = config
        self._context = context
        self._store = store
        self.left = config.trainer_restarts
        self._trainer: TrainerClient | None = None

    @property
    def trainer(self) -> TrainerClient:
        """The trainer, which starts in the background."""
        assert self._trainer is not None
        return self._trainer

    def begin(self) -> None:
        """Start the trainer, unless it was begun before."""
        if self._trainer is None:
            self._trainer = TrainerClient(self._config, self._context.seed, store=self._store)

    def again(self, error: TrainerLostError) -> None:
        """Start another trainer in the place of the one that was lost. Raises `error` if that may not be."""
        if not self.left:
            raise error
        self.left -= 1
        self._context.event("trainer_restarted", reason=str(error), restarts_left=self.left)
        self.trainer.close(at_once=True)
        self._trainer = TrainerClient(self._config, self._context.seed, store=self._store)

    def close(self) -> None:
        """End the trainer."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
