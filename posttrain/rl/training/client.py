"""The trainer as the rest of RL calls it: typed methods over the ranks of a `RankGroup`."""

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config.training import AdaptersConfig
from posttrain.errors import StageError, TrainerLostError
from posttrain.hosts.away import now_away, take_over
from posttrain.hosts.folders import FolderOffer
from posttrain.hosts.placement import in_cluster
from posttrain.hosts.relay import RelayError
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


def policy_trainer(
    config: TrainingConfig, seed: int, store: Path | None = None, *, template: str | None = None
) -> Trainer:
    """A `PolicyTrainer`, or on another host a `TrainerAway`. Only the ranks call this, so that the controller's process
    needs no torch.

    store: the file of the prompts' pictures; None for a policy that is shown none. template: the text of the chat
    template, if a file has it.
    """
    if now_away():
        from posttrain.rl.training.away import trainer_away

        return trainer_away(config, seed, template=template, store=store)
    from posttrain.rl.training.trainer import PolicyTrainer

    return PolicyTrainer(config, seed, store)


def absolute(config: TrainingConfig) -> TrainingConfig:
    """The config with absolute paths of models: a rank on another host has another working directory."""
    model, reference = config.model, config.loss.reference
    changed: dict[str, Any] = {"model": model.model_copy(update={"path": _absolute(model.path)})}
    if reference is not None and reference.path is not None:
        reference = reference.model_copy(update={"path": _absolute(reference.path)})
        changed["loss"] = config.loss.model_copy(update={"reference": reference})
    return config.model_copy(update=changed)


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())


def _template_text(config: TrainingConfig) -> str | None:
    chosen = config.model.chat_template
    return None if chosen is None or chosen.path is None else Path(chosen.path).read_text(encoding="utf-8")


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
        self._deadline_s = config.trainer_deadline_s
        if in_cluster():
            config, made = absolute(config), partial(policy_trainer, store=store, template=_template_text(config))
        else:
            made = partial(policy_trainer, store=store)
        self._ranks = RankGroup(
            config.parallel,
            config.resources.trainer,
            make or made,
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
        await self._taken(await self._ranks.call("save", str(folder)), folder)

    async def async_save_checkpoint(self, folder: Path, controller: dict[str, Any]) -> None:
        """See `Trainer.save_checkpoint`."""
        await self._taken(await self._ranks.call("save_checkpoint", str(folder), controller), folder)

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
        asyncio.run(self._taken(self._ranks.get("save", str(folder)), folder))

    def save_result(self, folder: Path, lora: AdaptersConfig | None) -> None:
        """Write the result of a stage into its folder: a whole model, adapters or both, as `lora.save` says."""
        if (adapter := adapter_folder(lora)) is not None:
            asyncio.run(self._taken(self._ranks.get("save_adapter", str(folder / adapter)), folder / adapter))
        if lora is None or lora.save != "adapter":
            self.save(folder / "model")

    async def _taken(self, offer: FolderOffer | None, folder: Path) -> None:
        """Take what a rank on another host has written."""
        try:
            await take_over(offer, folder, self._deadline_s)
        except RelayError as error:
            raise TrainerLostError(f"the trainer was lost while {folder.name} was taken from it: {error}") from error

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """See `Trainer.load_checkpoint`."""
        return self._ranks.get("load_checkpoint", str(folder.absolute()))

    def report(self) -> dict[str, Any]:
        """See `Trainer.report`."""
        return self._ranks.get("report")

    def close(self, at_once: bool = False) -> None:
        """End every rank. Trainers free their shared memory first, unless `at_once`, for when a rank may be lost."""
        self._ranks.close(None if at_once else "close")
