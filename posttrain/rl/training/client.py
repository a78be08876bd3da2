"""The trainer as the rest of RL calls it: typed methods over the ranks of a `RankGroup`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config.training import AdaptersConfig
from posttrain.errors import StageError, TrainerLostError
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.protocol import StepResult, Trainer
from posttrain.rl.training.samples import TrainSample
from posttrain.sampling.manifests import Manifest
from posttrain.tune.adapters import adapter_folder


def manifest_of(result: StepResult) -> Manifest:
    """The manifest of the new weights, which rank 0 publishes after every step. Raises StageError without one."""
    return _published(result.manifest)


def _published(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise StageError("rank 0 of the trainer published no weights")
    return manifest


def policy_trainer(config: TrainingConfig, seed: int, store: Path | None = None) -> Trainer:
    """A `PolicyTrainer`. Only the ranks call this, so that the controller's process needs no torch.

    store: the file of the prompts' pictures; None for a policy that is shown none.
    """
    from posttrain.rl.training.trainer import PolicyTrainer

    return PolicyTrainer(config, seed, store)


class TrainerClient:
    """A `Trainer` on the ranks that `parallel` and `resources.trainer` ask for. Ray must be initialised.

    The ranks start in the background, and the first call waits for them. Methods wait for the result; those whose names
    begin with `async_` can be awaited. make: a function; `make(config, seed)` returns the trainer of one rank, by
    default a `PolicyTrainer`. Every method raises `TrainerLostError` if a rank has died or does not answer within
    `trainer_deadline_s`. store: as for `policy_trainer`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        seed: int,
        make: Callable[[TrainingConfig, int], Trainer] | None = None,
        *,
        store: Path | None = None,
    ):
        self._ranks = RankGroup(
            config.parallel,
            config.resources.trainer,
            make or partial(policy_trainer, store=store),
            config,
            seed,
            deadline_s=config.trainer_deadline_s,
            name="the trainer",
            lost=TrainerLostError,
        )

    async def async_step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        """See `Trainer.step`."""
        return await self._ranks.call("step", samples, step)

    async def async_set_threads(self, threads: int) -> None:
        """See `Trainer.set_threads`."""
        await self._ranks.call("set_threads", threads)

    def set_threads(self, threads: int) -> None:
        """See `Trainer.set_threads`."""
        self._ranks.get("set_threads", threads)

    async def async_save(self, folder: Path) -> None:
        """See `Trainer.save`."""
        await self._ranks.call("save", str(folder))

    async def async_save_checkpoint(self, folder: Path, controller: dict[str, Any]) -> None:
        """See `Trainer.save_checkpoint`."""
        await self._ranks.call("save_checkpoint", str(folder), controller)

    async def async_publish(self) -> Manifest:
        """See `Trainer.publish`. Returns the manifest of rank 0."""
        return _published(await self._ranks.call("publish"))

    def step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        """See `Trainer.step`."""
        return self._ranks.get("step", samples, step)

    def publish(self) -> Manifest:
        """See `Trainer.publish`. Returns the manifest of rank 0."""
        return _published(self._ranks.get("publish"))

    def probe(self, size: float) -> Manifest:
        """See `Trainer.probe`. Returns the manifest of rank 0."""
        return _published(self._ranks.get("probe", size))

    def logprobs(self, samples: Sequence[TrainSample], adapters: bool = True) -> list[list[float]]:
        """See `Trainer.logprobs`."""
        return self._ranks.get("logprobs", samples, adapters)

    async def async_logprobs(self, samples: Sequence[TrainSample], adapters: bool = True) -> list[list[float]]:
        """See `Trainer.logprobs`."""
        return await self._ranks.call("logprobs", samples, adapters)

    def save(self, folder: Path) -> None:
        """See `Trainer.save`."""
        self._ranks.get("save", str(folder))

    def save_result(self, folder: Path, lora: AdaptersConfig | None) -> None:
        """Write the result of a stage into its folder: a whole model, adapters or both, as `lora.save` says."""
        if (adapter := adapter_folder(lora)) is not None:
            self._ranks.get("save_adapter", str(folder / adapter))
        if lora is None or lora.save != "adapter":
            self.save(folder / "model")

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """See `Trainer.load_checkpoint`."""
        return self._ranks.get("load_checkpoint", str(folder))

    def report(self) -> dict[str, Any]:
        """See `Trainer.report`."""
        return self._ranks.get("report")

    def close(self, at_once: bool = False) -> None:
        """End every rank. Trainers free their shared memory first, unless `at_once`, for when a rank may be lost."""
        self._ranks.close(None if at_once else "close")
