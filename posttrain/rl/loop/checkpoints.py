"""Checkpoints of a run, written beside the generation, and the commit that makes one count."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from posttrain.rl.history.ledger import Commit, Ledger
from posttrain.rl.history.recovery import CHECKPOINTS, SNAPSHOT, folder_hash
from posttrain.rl.training.client import TrainerClient


class Checkpoints:
    """Those of the stage in `folder`, one every `every` versions up to `steps`, the version of the last step."""

    def __init__(self, folder: Path, ledger: Ledger, trainer: TrainerClient, *, every: int, steps: int):
        self._folder = folder
        self._ledger = ledger
        self._trainer = trainer
        self._every = every
        self._steps = steps

    def is_due(self, version: int) -> bool:
        """Whether this version is to be kept. The last is: a larger `steps` goes on from there."""
        return version % self._every == 0 or version == self._steps

    async def write(self, version: int, state: dict[str, Any], *, archived_seq: int) -> None:
        """Write a checkpoint and commit it: from that transaction on it counts, and the one before it is removed.

        state: of the controller, as JSON. archived_seq: see `Ledger.commit`.
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
