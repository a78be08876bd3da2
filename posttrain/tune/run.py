"""One training of SFT or DPO: from checked examples to a model folder, on ranks that `parallel` lays out.

    stage's process: rows ─► examples ─► tune() ──┬─► rank 0: train_and_export() ─► model/, report ─► stage's process
                                                  └─► rank 1: ...        collectives with rank 0

One rank or many, one code path: each rank holds a DeepSpeed engine.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import StageError

ROWS = "tokenized"  # the rows on disk, while ranks read them
# What does not decide a training, besides the names of its data: how rows are dealt out to ranks and forwards does not,
# as long as a step has as many.
NOT_IN_RECIPE = {"resources", "checkpoint_every", "model", "parallel", "gradient_accumulation", "trackers"}


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a stage adds to the common training; made in each rank, once the model is there.

    trainer: a class of `EngineTrainer`, `StepTrainer` and one of TRL's. arguments: TRL's arguments for it. rows: what
    it trains on; the trainer shuffles them. blank: a row from which it learns nothing. sample: conversations on which
    the drift is measured. metrics: name that TRL logs -> name in metrics.jsonl. data_keys: keys of the config that name
    the data. report: from the metrics of each step to figures of the stage. options: more keyword arguments of the
    trainer.
    """

    trainer: Any
    arguments: Any
    rows: Sequence[Mapping[str, Any]]
    blank: Mapping[str, Any]
    sample: Sequence[Any]
    metrics: Mapping[str, str]
    data_keys: frozenset[str]
    report: Callable[[Sequence[Mapping[str, float]]], dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage hands to every rank.

    make: `make(config, context, model, data=data)` gives the `Tuning`. data: what the stage made of its rows.
    """

    make: Callable[..., Tuning]
    tokenizer: Any
    data: Sequence[Any]


def tune(config: Any, context: StageContext, work: Work) -> dict[str, Any]:
    """Train on the ranks that `config.parallel` asks for, and write `model/` into the stage's folder.

    config: of SFT or DPO. Returns the report of `train_and_export`. Raises `ConfigError` for a model that cannot be
    trained as asked, and `StageError` for a training that failed or whose ranks were lost.
    """
    from posttrain.parallel.ranks import run_on_ranks

    report = run_on_ranks(config.parallel, config.resources.trainer, train_and_export, config, context, work)
    shutil.rmtree(context.dir / ROWS, ignore_errors=True)
    return report


def train_and_export(config: Any, context: StageContext, work: Work) -> dict[str, Any]:
    """Load the model, train it, measure it and write its folder. Called on every rank, with the same arguments.

    Returns {"steps", "loss_first", "loss_last", "kl_from_start", "entropy_before", "entropy_after", the stage's own
    figures, "engine": the class of what trained, and its layout}.
    """
    import torch

    from posttrain.model.load import load_policy
    from posttrain.parallel.export import export_model
    from posttrain.tune.settings import prepare_model, quiet_environment

    quiet_environment()
    torch.manual_seed(context.seed)  # adapters begin with random weights
    model = load_policy(config.model)
    prepare_model(model)
    model_config = copy.deepcopy(model.config)  # TRL writes its own ideas into the model's config
    tuning = work.make(config, context, model, data=work.data)
    trained, report = _train(config, context, model, tuning=tuning, tokenizer=work.tokenizer)
    architecture = type(trained).__name__.removeprefix("Native")
    export_model(trained, model_config, architecture, tokenizer=work.tokenizer, path=context.dir / "model")
    return report


def _train(
    config: Any, context: StageContext, model: Any, *, tuning: Tuning, tokenizer: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns this rank's part of the trained model, adapters added into its weights, and the report."""
    from posttrain.parallel.engine import engine_report
    from posttrain.parallel.export import is_first_rank, without_adapters
    from posttrain.tune.adapters import adapter_config
    from posttrain.tune.checkpoints import digest_ids, fingerprint
    from posttrain.tune.drift import DriftProbe
    from posttrain.tune.dropout import use_row_dropout
    from posttrain.tune.loop import train

    probe = DriftProbe(model, tuning.sample)
    recipe = training_recipe(config, tuning.data_keys)
    identity = fingerprint(model, recipe, context.seed, digest_ids(tuning.rows))
    trainer = tuning.trainer(
        model=model,
        args=tuning.arguments,
        train_dataset=_shared_rows(tuning, context.dir / ROWS),
        processing_class=tokenizer,
        peft_config=adapter_config(model, config.lora) if config.lora else None,
        **tuning.options,
    )
    if config.lora and config.lora.dropout:
        trainer.row_keys = use_row_dropout(trainer.model, context.seed)
    history = train(
        trainer, context, tuning.metrics, fingerprint=identity, router_bias_rate=config.model.router.bias_rate
    )
    steps = trainer.state.global_step
    if steps == 0:
        raise StageError(f"{context.name}: no optimiser step was made")
    trained = without_adapters(trainer.model)
    drift = probe.measure(trained)
    figures = {
        **tuning.report(history),
        "loss_first": history[0]["loss"] if history else None,
        "loss_last": history[-1]["loss"] if history else None,
        "kl_from_start": drift.kl,
        "entropy_before": drift.entropy_before,
        "entropy_after": drift.entropy_after,
        **engine_report(trainer.model_wrapped, config.parallel),
    }
    if is_first_rank():
        context.metrics(steps, figures)
    return trained, {"steps": steps, **figures}


def training_recipe(config: Any, data_keys: frozenset[str]) -> dict[str, Any]:
    """What of a config decides a training, besides its start weights and data.

    A checkpoint is continued in any layout that has as many forwards a step.
    """
    recipe = config.model_dump(mode="json", exclude=NOT_IN_RECIPE | data_keys)
    forwards = config.parallel.processes * config.gradient_accumulation
    return {**recipe, "router": config.model.router.model_dump(), "forwards_a_step": forwards}


def _shared_rows(tuning: Tuning, folder: Path) -> Any:
    """The dataset, read from a folder that rank 0 writes. TRL lets rank 0 add columns, which the others read there."""
    from datasets import load_from_disk

    from posttrain.parallel.export import barrier, is_first_rank
    from posttrain.tune.steps import rows_and_blank

    if is_first_rank():
        rows_and_blank(tuning.rows, tuning.blank).save_to_disk(folder)
    barrier()
    return load_from_disk(folder)
