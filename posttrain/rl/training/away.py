"""The trainer and the reference on another host than the home host: what they read is brought there first.

    model, checkpoint: home host ──► cache of this host        checkpoint, model, adapters: this host ──► home host

Left out: pictures, whose file does not travel, and adapters as a start, whose base is somewhere else.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.hosts.afterwards import remove_afterwards
from posttrain.hosts.away import HandedOver, folder_now, host_named
from posttrain.hosts.folders import FolderOffer
from posttrain.parallel.away import model_here, staying
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.trainer import PolicyTrainer
from posttrain.sampling.weights import PREFIX


def config_here(config: TrainingConfig, key: str, store: Path | None) -> TrainingConfig:
    """The config with the model folders as this host has them. They are pulled if they are not there.

    key: of the section that says where this process runs. store: the file of the prompts' pictures. Raises UserError
    for what does not travel.
    """
    if store is not None:
        raise staying(key, "pictures do not travel")
    deadline_s = config.trainer_deadline_s
    model = config.model.model_copy(update={"path": model_here(config.model.path, key, deadline_s)})
    changed: dict[str, Any] = {"model": model}
    if (reference := config.loss.reference) is not None and reference.path is not None:
        reference = reference.model_copy(update={"path": model_here(reference.path, key, deadline_s)})
        changed["loss"] = config.loss.model_copy(update={"reference": reference})
    return config.model_copy(update=changed)


def trainer_away(config: TrainingConfig, seed: int, *, template: str | None, store: Path | None) -> "TrainerAway":
    """The trainer of this rank. template: the text of the chat template, if a file of the home host has it."""
    here = config_here(config, "resources.trainer", store)
    chosen = here.model.chat_template
    with tempfile.TemporaryDirectory() as folder:
        if template is not None and chosen is not None:
            file = Path(folder) / "template.jinja"
            file.write_text(template, encoding="utf-8")
            chosen = chosen.model_copy(update={"path": str(file)})
        model = here.model.model_copy(update={"chat_template": chosen})
        return TrainerAway(here.model_copy(update={"model": model}), seed, config.model.path)


class TrainerAway(PolicyTrainer):
    """A `PolicyTrainer` on another host. What rank 0 writes is offered, and the home host takes it.

    base: the folder on the home host on which adapters stand.
    """

    def __init__(self, config: TrainingConfig, seed: int, base: str):
        super().__init__(config, seed)
        self._base_named = Path(base)
        self._handed = HandedOver()
        if self._rank == 0:  # which may be killed after a cut, when nobody else of the run is on its host
            remove_afterwards(f"/dev/shm/{PREFIX}{os.getpid()}-*")

    def save(self, folder: str) -> FolderOffer | None:
        """See `Trainer.save`."""
        with self._written(folder) as place:
            super().save(str(place))
        return self._offered(place)

    def save_adapter(self, folder: str) -> FolderOffer | None:
        """See `Trainer.save_adapter`."""
        with self._written(folder) as place:
            super().save_adapter(str(place))
        return self._offered(place)

    def save_checkpoint(self, folder: str, controller: dict[str, Any]) -> FolderOffer | None:
        """See `Trainer.save_checkpoint`."""
        with self._written(folder) as place:
            super().save_checkpoint(str(place), controller)
        return self._offered(place)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """See `Trainer.load_checkpoint`."""
        return super().load_checkpoint(folder_now(folder, self._config.trainer_deadline_s))

    def close(self) -> None:
        """See `Trainer.close`."""
        self._handed.close()
        super().close()

    @contextlib.contextmanager
    def _written(self, folder: str) -> Iterator[Path]:
        """Where rank 0 of this host writes what the home host will have as `folder`. Names the host of a full disk."""
        with host_named():
            yield Path(folder) if self._rank else self._handed.begin(Path(folder).name)

    def _offered(self, place: Path) -> FolderOffer | None:
        return None if self._rank else self._handed.offer(place)
