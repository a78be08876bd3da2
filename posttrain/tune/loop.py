"""Run a TRL trainer in every rank of a stage: report progress and metrics, seal checkpoints, resume after a kill.

Only rank 0 reports to the stage. Left out: TRL's own evaluation (see held_out.py) and its trackers (see
metrics/trackers.py).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.config.held_out import HeldOutConfig
from posttrain.errors import StageError
from posttrain.model.router_balance import native_layers
from posttrain.parallel.export import barrier, is_first_rank
from posttrain.parallel.state import load_state
from posttrain.tune.checkpoints import Sealed
from posttrain.tune.held_out import HELD_OUT_METRICS, LOSS, HeldOutCallback
from posttrain.tune.home import StageHere
from posttrain.tune.routers import ROUTER_METRICS, RouterCallback

BUSY_INTERVAL_S = 1.0


class StageCallback(TrainerCallback):
    """Passes the trainer's logs to the stage's context, and has checkpoints sealed.

    here: the stage on this host. names: name that TRL logs -> name in metrics.jsonl; other logged values are left out.
    fingerprint: of the training. resumed: the checkpoint from which the training continues. The trainer counts tokens
    only since then. held_out: the callback that evaluates held-out rows, or None.
    """

    def __init__(
        self,
        here: StageHere,
        trainer: Any,
        *,
        names: Mapping[str, str],
        fingerprint: str,
        resumed: Sealed,
        held_out: HeldOutCallback | None,
    ):
        self.context = here.context
        self.names = dict(names)
        self.fingerprint = fingerprint
        self.history: list[dict[str, float]] = []
        self._here = here
        self._trainer = trainer
        self._tokens_before = resumed.tokens
        self._held_out = held_out
        self._busy_since = time.time()

    @property
    def tokens(self) -> int:
        """Tokens of all steps, including those before the training was resumed."""
        return self._tokens_before + self._trainer.tokens_seen

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._busy_since = time.time()
        if self._held_out is None or not is_first_rank():
            return
        if figures := self._held_out.baseline:
            self.context.metrics(state.global_step, figures)
            shown = {"held-out loss": figures[LOSS]}
            self.context.progress(state.global_step, state.max_steps, "steps", values=shown)
        if self._held_out.has_ended:
            self.context.event("not_continued", step=state.global_step, **self._held_out.end())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: object) -> None:
        if not logs or "loss" not in logs:  # TRL's summary at the end of the training
            return
        values = {name: float(logs[logged]) for logged, name in self.names.items() if logged in logs}
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            raise StageError(
                f"{self.context.name}: {bad} is {values[bad]} at step {state.global_step}; lower "
                "optimizer.learning_rate (checkpoints of earlier steps are intact)"
            )
        values["tokens"] = self.tokens
        self.history.append(values)
        if not is_first_rank():
            return
        self.context.metrics(state.global_step, values)
        shown = {name: values[name] for name in ("loss", "accuracy") if name in values}
        if self._held_out is not None and self._held_out.standing.last_loss is not None:
            shown["held-out loss"] = self._held_out.standing.last_loss
        self.context.progress(state.global_step, state.max_steps, "steps", values=shown)
        self._busy(at_least_s=BUSY_INTERVAL_S)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        barrier()  # rank 0 has written it
        if is_first_rank():
            kept = None if self._held_out is None else self._held_out.kept_step
            self._here.give(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            path = self._here.files.seal(state.global_step, self.fingerprint, tokens=self.tokens, kept=kept)
            self.context.event("checkpoint", step=state.global_step, path=str(path))
        barrier()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if is_first_rank():
            self._busy(at_least_s=0.0)
            if self._held_out is not None and self._held_out.has_ended and self.history:
                self.context.event("ended_early", step=state.global_step, **self._held_out.end())

    def _busy(self, at_least_s: float) -> None:
        now = time.time()
        if now - self._busy_since >= at_least_s:
            self.context.busy("trainer", self.context.name, start=self._busy_since, end=now)
            self._busy_since = now


@dataclass(frozen=True, slots=True)
class Trained:
    """history: the metrics of each step of this call. held_out: the callback that evaluated held-out rows, or None."""

    history: list[dict[str, float]]
    held_out: HeldOutCallback | None


def train(
    trainer: Any,
    here: StageHere,
    names: Mapping[str, str],
    *,
    fingerprint: str,
    router_bias_rate: float,
    held_out: HeldOutConfig | None,
) -> Trained:
    """Train a `StepTrainer`, from the last checkpoint of the same training if there is one. Collective.

    It trains to the last step, or until it ends early. here: the stage on this host. names: as for `StageCallback`.
    With `held_out.keep_best` the model has the weights of the best evaluation afterwards. Raises `StageError` if a
    metric, such as the loss or the gradient norm, is not a finite number.
    """
    found = _resume_point(here, fingerprint)
    resumed = found if found.path is None else replace(found, path=here.checkpoint(found.path))
    evaluation = None
    if held_out is not None:
        evaluation = HeldOutCallback(trainer, held_out, here, resumed=resumed.path, training=fingerprint)
    callback = StageCallback(
        here,
        trainer,
        names={**names, **ROUTER_METRICS, **HELD_OUT_METRICS},
        fingerprint=fingerprint,
        resumed=resumed,
        held_out=evaluation,
    )
    trainer.remove_callback(PrinterCallback)
    if evaluation is not None:  # before StageCallback, as the routers' below
        trainer.add_callback(evaluation)
    if native_layers(trainer.model) is not None:
        # It must come before StageCallback, because it adds figures that StageCallback logs, and a file to the
        # checkpoint that StageCallback seals.
        routers = RouterCallback(trainer.model, router_bias_rate, resumed.path)
        trainer.router_balance = routers.balance
        trainer.add_callback(routers)
    trainer.add_callback(callback)
    if found.path is not None and is_first_rank():
        here.context.event("resumed", step=found.step, path=str(found.path))
    trainer.train(resume_from_checkpoint=None if resumed.path is None else str(resumed.path))
    steps = trainer.state.global_step
    if evaluation is not None and (kept := evaluation.kept_step) not in (None, steps):
        load_state(trainer.model_wrapped, here.kept_checkpoint(kept))
    return Trained(callback.history, evaluation)


def _resume_point(here: StageHere, fingerprint: str) -> Sealed:
    """The checkpoint on the home host to continue from, the same on every rank. Rank 0 finds it."""
    held: list[Any] = [here.files.resume_point(fingerprint) if is_first_rank() else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]
