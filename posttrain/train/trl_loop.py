"""Run a TRL trainer as part of a stage: progress and metrics out, checkpoints sealed, resumed after a kill.

Left out: evaluation during training (a stage of its own) and trackers.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.train.master_adamw import MasterAdamW
from posttrain.train.trl_checkpoints import Sealed, drop_metrics_after, latest, seal

BUSY_INTERVAL_S = 1.0


class StageCallback(TrainerCallback):
    """Hands what the trainer logs to the stage's context, and seals checkpoints.

    names: logged name -> name in metrics.jsonl; anything else that TRL logs is left out. resumed: where training
    goes on; TRL counts tokens from 0 again.
    """

    def __init__(self, context: StageContext, what: str, names: Mapping[str, str], fingerprint: str, resumed: Sealed):
        self.context = context
        self.what = what
        self.names = dict(names)
        self.fingerprint = fingerprint
        self.tokens_before = resumed.tokens
        self.tokens = resumed.tokens
        self.history: list[dict[str, float]] = []
        self._busy_since = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._busy_since = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        values = {name: float(logs[logged]) for logged, name in self.names.items() if logged in logs}
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            raise StageError(
                f"{self.what}: {bad} is {values[bad]} at step {state.global_step}; lower optimizer.learning_rate"
                " (checkpoints of earlier steps are intact)"
            )
        values["tokens"] = self.tokens = self.tokens_before + int(logs["num_tokens"])
        self.history.append(values)
        self.context.metrics(state.global_step, values)
        shown = {name: values[name] for name in ("loss", "accuracy") if name in values}
        self.context.progress(state.global_step, state.max_steps, "steps", shown)
        self._busy(at_least_s=BUSY_INTERVAL_S)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = seal(Path(args.output_dir), state.global_step, self.fingerprint, self.tokens)
        self.context.event("checkpoint", step=state.global_step, path=str(path))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._busy(at_least_s=0.0)

    def _busy(self, at_least_s: float) -> None:
        now = time.time()
        if now - self._busy_since >= at_least_s:
            self.context.busy("trainer", self.what, self._busy_since, now)
            self._busy_since = now


def train(
    trainer: Any, context: StageContext, what: str, names: Mapping[str, str], fingerprint: str
) -> list[dict[str, float]]:
    """Train a transformers `Trainer` to the end, from the last checkpoint of the same training if there is one.

    Returns the metrics of each step trained in this process. Raises `StageError` if the loss or the gradient is not
    a number.
    """
    resumed = latest(Path(trainer.args.output_dir), fingerprint)
    callback = StageCallback(context, what, names, fingerprint, resumed)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    if any(p.dtype == torch.bfloat16 for p in trainer.model.parameters() if p.requires_grad):
        args = trainer.args
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (MasterAdamW, options)
    drop_metrics_after(context.dir / "metrics.jsonl", resumed.step)
    if resumed.path is not None:
        context.event("resumed", step=resumed.step, path=str(resumed.path))
    trainer.train(resume_from_checkpoint=None if resumed.path is None else str(resumed.path))
    return callback.history
