"""Write checkpoints of a run while engines sample, and commit each of them in the ledger."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from posttrain.rl.history.ledger import Commit, Ledger
from posttrain.rl.history.recovery import CHECKPOINTS, SNAPSHOT, folder_hash
from posttrain.rl.training.client import TrainerClient


class Checkpoints:
    """The checkpoints of the stage in `folder`: one every `every` policy versions, and one at the last, `steps`."""

    def __init__(self, folder: Path, ledger: Ledger, trainer: TrainerClient, *, every: int, steps: int):
        self._folder = folder
        self._ledger = ledger
        self._trainer = trainer
        self._every = every
        self._steps = steps

    def is_due(self, version: int) -> bool:
        """Whether this version gets a checkpoint. The last one does, so that a larger `steps` can continue from it."""
        return version % self._every == 0 or version == self._steps

    async def write(self, version: int, state: dict[str, Any], *, archived_seq: int) -> None:
        """Write a checkpoint, commit it in the ledger, and then remove the older ones.

        A run that is killed before the commit resumes from the checkpoint before. state: that of the controller, as
        JSON. archived_seq: see `Ledger.commit`.
        """
        folder = self._folder / CHECKPOINTS / f"step_{version}"
        folder.parent.mkdir(exist_ok=True)
        aside = folder.parent / f".{SNAPSHOT}"
        await self._ledger.snapshot(aside)
        await self._trainer.async_save_checkpoint(folder, state)
        aside.rename(folder / SNAPSHOT)
        digest = await asyncio.to_thread(folder_hash, folder)
        await self._ledger.commit(Commit(version, f"{CHECKPOINTS}/{folder.name}", digest), archived_seq)
        for old in folder.parent.glob("step_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
