"""The trainer and the reference on another host than the home host: what they read is brought there first.

    model, checkpoint: home host ──► cache of this host        checkpoint, model, adapters: this host ──► home host

Left out: pictures, whose file does not travel, and adapters as a start, whose base is somewhere else.
"""

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import StageError, UserError
from posttrain.hosts.away import HandedOver, folder_now
from posttrain.hosts.folders import CACHE_VARIABLE, FolderOffer
from posttrain.model.adapter import is_adapter
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.trainer import PolicyTrainer


def config_here(config: TrainingConfig, key: str, store: Path | None) -> TrainingConfig:
    """The config with the model folders as this host has them. They are pulled if they are not there.

    key: of the section that says where this process runs. store: the file of the prompts' pictures. Raises UserError
    for what does not travel.
    """
    placed = f"{key}: was placed on host {socket.gethostname()}"
    stay = "give the home host the CPUs and GPUs that it asks for, or name that host in nodes"
    if store is not None:
        raise UserError(f"{placed}, and pictures do not travel; {stay}")

    def here(path: str) -> str:
        found = folder_now(path, config.trainer_deadline_s)
        if is_adapter(found):
            raise UserError(f"{placed}, and {path} holds adapters, whose base does not travel; {stay}")
        return found

    model = config.model.model_copy(update={"path": here(config.model.path)})
    changed: dict[str, Any] = {"model": model}
    if (reference := config.loss.reference) is not None and reference.path is not None:
        reference = reference.model_copy(update={"path": here(reference.path)})
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

    base: the folder of the model on the home host, on which adapters stand.
    """

    def __init__(self, config: TrainingConfig, seed: int, base: str):
        super().__init__(config, seed)
        self._base = Path(base)
        self._handed = HandedOver()

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
        try:
            yield Path(folder) if self._rank else self._handed.begin(Path(folder).name)
        except OSError as error:
            raise StageError(
                f"host {socket.gethostname()}: {error.filename or 'its disk'} cannot be written: {error.strerror}; "
                f"free some space, or set {CACHE_VARIABLE} to a larger disk on that host"
            ) from error

    def _offered(self, place: Path) -> FolderOffer | None:
        return None if self._rank else self._handed.offer(place)
