"""Run a TRL trainer as part of a stage: progress and metrics out, checkpoints sealed, resumed after a kill.

Left out: evaluation during training (a stage of its own) and TRL's own trackers (see metrics/trackers.py).
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback

from posttrain.config.shared import ParallelConfig
from posttrain.context import StageContext, silenced
from posttrain.errors import StageError
from posttrain.files import keep_lines
from posttrain.model.load import save_model
from posttrain.model.router_bias import native_layers
from posttrain.parallel.export import barrier, export_model
from posttrain.train.adapters import merged
from posttrain.train.master_adamw import MasterAdamW
from posttrain.train.routers import ROUTER_METRICS, RouterCallback, with_router_loss
from posttrain.train.trl_checkpoints import Sealed, latest, seal

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
        self.context.progress(state.global_step, state.max_steps, "steps", values=shown)
        self._busy(at_least_s=BUSY_INTERVAL_S)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        barrier()  # every rank has written its part
        if state.is_world_process_zero:
            path = seal(Path(args.output_dir), state.global_step, self.fingerprint, self.tokens)
            self.context.event("checkpoint", step=state.global_step, path=str(path))
        barrier()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._busy(at_least_s=0.0)

    def _busy(self, at_least_s: float) -> None:
        now = time.time()
        if now - self._busy_since >= at_least_s:
            self.context.busy("trainer", self.what, start=self._busy_since, end=now)
            self._busy_since = now


def train(
    trainer: Any,
    context: StageContext,
    what: str,
    names: Mapping[str, str],
    fingerprint: str,
    router_bias_rate: float = 0.0,
) -> list[dict[str, float]]:
    """Train a transformers `Trainer` to the end, from the last checkpoint of the same training if there is one.

    Returns the metrics of each step trained in this process. Raises `StageError` if the loss or the gradient is not
    a number.
    """
    resumed = _of_first_rank(lambda: _resume_point(trainer, context, fingerprint))
    callback = StageCallback(context, what, {**names, **ROUTER_METRICS}, fingerprint, resumed)
    trainer.remove_callback(PrinterCallback)
    if native_layers(trainer.model) is not None:
        # Before the other: it adds to what that one logs and to the checkpoint that it seals.
        trainer.add_callback(RouterCallback(trainer.model, router_bias_rate, resumed.path))
    trainer.add_callback(callback)
    in_bf16 = any(p.dtype == torch.bfloat16 for p in trainer.model.parameters() if p.requires_grad)
    if in_bf16 and not trainer.is_deepspeed_enabled:  # DeepSpeed keeps fp32 masters itself
        args = trainer.args
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (MasterAdamW, options)
    if resumed.path is not None:
        context.event("resumed", step=resumed.step, path=str(resumed.path))
    trainer.train(resume_from_checkpoint=None if resumed.path is None else str(resumed.path))
    return callback.history


def _resume_point(trainer: Any, context: StageContext, fingerprint: str) -> Sealed:
    """Where to go on; what was written after it is cleared away."""
    resumed = latest(Path(trainer.args.output_dir), fingerprint)
    keep_lines(context.dir / "metrics.jsonl", lambda line: line["step"] <= resumed.step)
    return resumed


def _of_first_rank(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank."""
    if not dist.is_initialized():
        return make()
    held = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def own_context(context: StageContext) -> StageContext:
    """The context itself in a stage's own process and in rank 0; a silent one in the other ranks."""
    return context if not dist.is_initialized() or dist.get_rank() == 0 else silenced(context)


def training_recipe(config: Any, inputs: set[str]) -> dict[str, Any]:
    """What of a config decides a training, besides its start weights and data. How rows are dealt to ranks does not:
    a checkpoint is continued in any layout with as many rows a step."""
    left_out = {"resources", "checkpoint_every", "model", "parallel", "gradient_accumulation", "trackers", *inputs}
    processes = config.parallel.processes if config.parallel else 1
    recipe = config.model_dump(mode="json", exclude=left_out)
    recipe["router"] = config.model.router.model_dump()
    return {**recipe, "forwards_a_step": processes * config.gradient_accumulation, "engine": bool(config.parallel)}


def shared_dataset(dataset: Any, folder: Path) -> Any:
    """The dataset itself in one process; in ranks, one on disk: rank 0 adds columns that the others read there."""
    if not dist.is_initialized():
        return dataset
    from datasets import load_from_disk

    if dist.get_rank() == 0:
        dataset.save_to_disk(folder)
    barrier()
    return load_from_disk(folder)


def trainer_class_for(trainer_class: type, parallel: ParallelConfig | None) -> Any:
    """The trainer class for a training with or without an engine; both add the losses on routers."""
    trainer_class = with_router_loss(trainer_class)
    if parallel is None:
        return trainer_class
    from posttrain.train.engine_trainer import with_engine

    return with_engine(trainer_class)


def trained_model(trainer: Any, model_config: Any, parallel: ParallelConfig | None) -> Any:
    """The plain model after training, adapters merged in. With an engine it stays divided over the ranks."""
    if parallel is None:
        model = merged(trainer.model)
    else:
        model = trainer.model
        if hasattr(model, "merge_and_unload"):
            from posttrain.parallel.export import merge_adapters

            merge_adapters(model)
            model = model.get_base_model()
    model.config = model_config
    return model


def save_trained(model: Any, tokenizer: Any, folder: Path, parallel: ParallelConfig | None) -> None:
    """Write the model folder, from one process or from all ranks."""
    if parallel is None:
        save_model(model, tokenizer, folder)
    else:
        architecture = type(model).__name__.removeprefix("Native")
        export_model(model, model.config, architecture, tokenizer, folder)
