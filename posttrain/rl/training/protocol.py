"""The methods of a trainer of RL, as types. Any class with these methods can take the place of `PolicyTrainer`.

    controller, parity, replay ──► TrainerClient ──► RankGroup ──► one `Trainer` on every rank
                                        ◄── StepResult of rank 0

The methods of a `Trainer` are called on every rank with the same arguments. The result of rank 0 is returned.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from posttrain.hosts.folders import FolderOffer
from posttrain.rl.training.samples import TrainSample
from posttrain.sampling.manifests import Manifest


class SkippedUpdate(msgspec.Struct, frozen=True):
    """A record of an update that was skipped because its loss or gradient was not finite.

    loss, grad_norm: as text, since JSON has no infinity. samples: indices, in the step's batch, of the samples in
    micro-batches whose loss was not finite. Example:
    `SkippedUpdate(7, 7, 1e-5, loss="nan", grad_norm="nan", samples=[3], skipped_in_a_row=1)`.
    """

    step: int
    policy_version: int
    learning_rate: float
    loss: str
    grad_norm: str
    samples: list[int]
    skipped_in_a_row: int


class StepResult(msgspec.Struct, frozen=True):
    """The result of one optimizer step.

    metrics: figures, finite ones only. manifest: tells the engines where the new weights are; None on ranks other than
    0. began, ended: Unix times. nonfinite: None if the update was applied. Example: `StepResult({"loss": 0.2},
    manifest, 1764.0, 1766.5)`.
    """

    metrics: dict[str, float]
    manifest: Manifest | None
    began: float
    ended: float
    nonfinite: SkippedUpdate | None = None


class Trainer(Protocol):
    """A policy and its optimizer. The policy's version is the number of optimizer steps that it has had."""

    def step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        """Do optimizer step `step`, counted from 0, on a whole batch, and publish the new weights."""
        ...

    def set_threads(self, threads: int) -> None:
        """Compute with this many threads from now on, on a CPU. The metric `train_threads` tells the number."""
        ...

    def publish(self) -> Manifest | None:
        """Make the weights that steps change available to the engines. Ranks other than 0 return None."""
        ...

    def probe(self, size: float) -> Manifest | None:
        """Give the adapters random values, and publish the weights; size 0 takes the values back.

        size: the norm of what an adapter adds, as a multiple of that of the weight. Ranks other than 0 return None.
        """
        ...

    def logprobs(self, samples: Sequence[TrainSample], adapters: bool = True) -> list[list[float]]:
        """Log-probabilities of each sample's reply tokens under the policy, in the order given.

        adapters: False gives those of the model from which the training started: without new adapters, and with
        continued ones as they were.
        """
        ...

    def save(self, folder: str) -> FolderOffer | None:
        """Write the policy as a model folder. On another host than the home host: offer it."""
        ...

    def save_adapter(self, folder: str) -> FolderOffer | None:
        """Write the policy's adapters as a folder in peft's format. On another host than the home host: offer it."""
        ...

    def save_checkpoint(self, folder: str, controller: dict[str, Any]) -> FolderOffer | None:
        """Write policy, optimizer and the controller's state (JSON), whole or not at all. On another host than the home
        host: offer them.
        """
        ...

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Continue from `save_checkpoint`; returns the controller's state."""
        ...

    def report(self) -> dict[str, Any]:
        """The engine and its layout, for the stage's figures."""
        ...

    def close(self) -> None:
        """Free everything that is held outside this process, such as shared memory."""
        ...
