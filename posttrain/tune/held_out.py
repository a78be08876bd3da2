"""Measure the loss on held-out rows during a training, keep the best model, and end the training early.

    before the first step, and every N steps:
    held-out rows, divided among the ranks ─► forwards ─► sums over all ranks ─► figures ─► Standing
                                                best so far: its checkpoint is kept ◄───┤
                                                no better for long: training ends ◄─────┘

A figure is a sum over all held-out rows divided by a count over all of them, so it does not depend on how they are
divided among forwards and ranks. The standing is part of each checkpoint. Every evaluation is also noted in a file as
soon as it is made, so that a training that was killed between an evaluation and the next checkpoint does not repeat it
once it has come to the same weights again. Left out: how a loss is computed, which the trainer of the stage does
(`held_out_sums`, `held_out_figures`).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from posttrain.config.held_out import HeldOutConfig
from posttrain.files import write_json
from posttrain.parallel.export import is_first_rank
from posttrain.tune.checkpoints import fingerprint, seal_start
from posttrain.tune.home import StageHere

STATE = "held_out.json"
LOSS = "held_out_loss"
HELD_OUT_METRICS = {name: name for name in (LOSS, "held_out_margin", "held_out_accuracy")}


@dataclass(frozen=True, slots=True)
class Standing:
    """The summary of all evaluations so far.

    best_step, best_loss: of the evaluation with the lowest loss; None before the first evaluation. Step 0 is the start.
    misses: number of scheduled evaluations since then, none of which was better. first_loss, last_loss: of the first
    and the last evaluation. Losses are means over trained tokens in nats (SFT) or over pairs (DPO).
    """

    best_step: int | None = None
    best_loss: float | None = None
    misses: int = 0
    first_loss: float | None = None
    last_loss: float | None = None

    def after(self, step: int, loss: float, *, scheduled: bool = True) -> "Standing":
        """The standing after one more evaluation.

        scheduled: False for the evaluation after the last step. It does not count as a miss, because a training with
        more epochs would not have it.
        """
        first = loss if self.first_loss is None else self.first_loss
        if self.best_loss is None or loss < self.best_loss:
            return Standing(step, loss, 0, first, loss)
        return replace(self, misses=self.misses + scheduled, last_loss=loss)


def batches(rows: int, size: int, rank: int, *, ranks: int) -> Iterator[list[int]]:
    """The batches of one rank, as indices of rows. Every rank has equally many.

    Index `rows` is the blank row. A rank without rows gets a batch of it, because the forwards of all ranks exchange
    experts and weights, so every rank needs the same number of forwards.
    """
    every = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    every += [[rows]] * (-len(every) % ranks)
    yield from every[rank::ranks]


class Evaluations:
    """The evaluations that a training has made, also before it was killed. Each is known by the weights it measured.

    here: the stage on this host. training: fingerprint of the training. Rank 0 reads and writes the file.
    """

    def __init__(self, here: StageHere, training: str):
        self._here, self._training = here, training
        self._figures: dict[str, dict[str, float]] = {}
        if is_first_rank():
            self._figures = {line["of"]: line["figures"] for line in here.files.evaluations()}

    def figures(self, trainer: Any) -> dict[str, float]:
        """The figures of the trainer's present weights, evaluated unless they are known. Collective."""
        weights = fingerprint(trainer.model, self._training, trainer.state.global_step)
        held: list[Any] = [self._figures.get(weights)]
        if dist.is_initialized():
            dist.broadcast_object_list(held, src=0)
        if held[0] is not None:
            return held[0]
        found = evaluate(trainer)
        if is_first_rank():
            record = {"step": trainer.state.global_step, "of": weights, "figures": found}
            self._here.files.add_evaluation(record)
        return found


class HeldOutCallback(TrainerCallback):
    """Evaluates, logs the figures, and writes the standing into checkpoints.

    trainer: a `StepTrainer`, whose `eval_dataset` holds the held-out rows and the blank row as the last one. training:
    its fingerprint. here: the stage on this host. resumed: the checkpoint from which training continues, or None.
    """

    def __init__(
        self, trainer: Any, config: HeldOutConfig, here: StageHere, *, resumed: Path | None = None, training: str = ""
    ):
        self.standing = Standing()
        self.config = config
        self.baseline: dict[str, float] = {}  # the figures before the first step, unless they were logged before
        self._trainer = trainer
        self._here = here
        self._training = training
        self._figures: dict[str, float] = {}
        if resumed is not None:
            self.standing = Standing(**json.loads((resumed / STATE).read_text()))

    @property
    def kept_step(self) -> int | None:
        """The step of the best model, whose checkpoint is kept; None without `keep_best` or before an evaluation."""
        return self.standing.best_step if self.config.keep_best else None

    @property
    def has_ended(self) -> bool:
        """True if the training ends early."""
        return self.config.patience is not None and self.standing.misses >= self.config.patience

    def is_due(self, step: int, last: int) -> bool:
        """True if there is an evaluation after this step. last: the last step of the training."""
        return step % self.config.every == 0 or step >= last

    def take(self, step: int, loss: float) -> None:
        """Note the loss of the evaluation after this step."""
        self.standing = self.standing.after(step, loss, scheduled=step % self.config.every == 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A training that was killed between its early end and its export does not train another step.
        control.should_training_stop = self.has_ended
        self._made = Evaluations(self._here, self._training)
        if self.standing.best_loss is None:
            self.baseline = self._made.figures(self._trainer)
            self.take(state.global_step, self.baseline[LOSS])
            if self.kept_step is not None:
                start = seal_start(self._trainer.model_wrapped, Path(args.output_dir), self._training)
                if is_first_rank():
                    self._here.give(start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if not self.is_due(step, state.max_steps):
            return
        self._figures = self._made.figures(self._trainer)
        self.take(step, self._figures[LOSS])
        if self.has_ended:
            control.should_training_stop = control.should_save = True
        if self.kept_step == step:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            logs.update(self._figures)
            self._figures = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, asdict(self.standing))

    def report(self, steps: int) -> dict[str, Any]:
        """The figures for the stage's result. steps: number of trained steps."""
        standing = self.standing
        return {
            "held_out_loss_first": standing.first_loss,
            "held_out_loss_last": standing.last_loss,
            "held_out_loss_best": standing.best_loss,
            "best_step": standing.best_step,
            "result_step": steps if self.kept_step is None else self.kept_step,
            "stopped_early": self.has_ended,
        }

    def end(self) -> dict[str, Any]:
        """What an early end is explained with."""
        return {"misses": self.standing.misses, "best_step": self.standing.best_step, "patience": self.config.patience}


@torch.no_grad()
def evaluate(trainer: Any) -> dict[str, float]:
    """The figures of the held-out rows by name (`HELD_OUT_METRICS`), the same on every rank. Collective."""
    rows, accelerator, model = trainer.eval_dataset, trainer.accelerator, trainer.model_wrapped
    was_training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    size = trainer.args.per_device_train_batch_size
    for batch in batches(len(rows) - 1, size, accelerator.process_index, ranks=accelerator.num_processes):
        inputs = send_to_device(trainer.data_collator([rows[index] for index in batch]), trainer.args.device)
        for name, value in trainer.held_out_sums(model, inputs).items():
            sums[name] = sums.get(name, 0.0) + value.double()
    model.train(was_training)
    totals: Any = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    return trainer.held_out_figures(dict(zip(sums, totals.tolist(), strict=True)))
