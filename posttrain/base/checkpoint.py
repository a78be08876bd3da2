"""The checkpoint of a base training, from which a training that was cut goes on to the same weights, bit for bit.

It is one file, `step_N.pt`, which the first process writes: the weights, and the state of both optimizers. The text is
not in it. A training that goes on draws the batches of the first N steps again, which takes a few seconds.
"""

import re
from pathlib import Path
from typing import Any

import torch

from posttrain.base.muon import Muon
from posttrain.files import remove, replacing

_CHECKPOINTS = 20  # about so many in a training


class Checkpoints:
    """The folder with the checkpoint of a training.

    training: tells it from others. Each process makes one of these, and all of them call each method together.
    """

    def __init__(self, folder: Path, training: str):
        self._folder = folder
        self._training = training

    def load(self, model: torch.nn.Module, muon: Muon, adam: torch.optim.Optimizer) -> int:
        """Continue from the checkpoint of this training, if there is one. Returns the number of steps done."""
        for path in sorted(self._folder.glob("step_*.pt"), key=_step_of, reverse=True):
            state: dict[str, Any] = torch.load(path, weights_only=True)
            if state["training"] == self._training:
                model.load_state_dict(state["model"])
                muon.continue_from(state["muon"])
                adam.load_state_dict(state["adam"])
                return _step_of(path)
        return 0

    def save(self, step: int, model: torch.nn.Module, *, muon: Muon, adam: torch.optim.Optimizer) -> None:
        """Write the checkpoint, whole or not at all, and delete earlier ones. step: the number of steps done."""
        momentum = muon.momentum()
        if momentum is None:  # in all processes but the first
            return
        self._folder.mkdir(exist_ok=True)
        earlier = list(self._folder.glob("step_*.pt"))
        state = {
            "training": self._training, "model": model.state_dict(), "muon": momentum, "adam": adam.state_dict()
        }  # fmt: skip
        with replacing(self._folder / f"step_{step}.pt") as aside:
            torch.save(state, aside)
        for path in earlier:
            if _step_of(path) != step:
                remove(path)


def is_due(step: int, steps: int) -> bool:
    """Whether a checkpoint is written after `step` of `steps` steps. After the last, the model itself is written."""
    return step < steps and step % max(1, steps // _CHECKPOINTS) == 0


def _step_of(path: Path) -> int:
    found = re.search(r"\d+", path.name)
    assert found is not None
    return int(found[0])
