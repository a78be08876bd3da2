"""One training of SFT or DPO on ranks, from checked examples to a model folder.

    stage's process: rows ─► examples ─► tune() ──┬─► rank 0: train_and_export() ─► model/, report ─► stage's process
                                                  └─► rank 1: ...        collectives with rank 0

`parallel` in the config says how many ranks there are. One rank takes the same path as many: each holds a DeepSpeed
engine.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import StageError
from posttrain.model.adapter import base_folder, check_adapter
from posttrain.model.adapter_start import continues, started_lora
from posttrain.tune.home import ROWS, absolute, folder_of_host, home_files, stage_here

if TYPE_CHECKING:
    from posttrain.model.vision.tiling import PictureTiles
    from posttrain.tune.examples import Example
    from posttrain.tune.home import StageHere

TRAINED, HELD_OUT = "trained", "held_out"  # the folders of the trainer's rows, in ROWS
# The keys of a config that do not change the result of a training, besides the keys that name its data. `parallel` and
# `gradient_accumulation` are among them, because only the number of forwards of a step counts (see `training_recipe`).
# `epochs` is among them, because a training with more epochs continues from the checkpoint at which fewer ended;
# so does a training with more of `held_out.patience`.
NOT_IN_RECIPE = {
    "resources", "checkpoint_every", "model", "parallel", "gradient_accumulation", "trackers", "epochs",
    "shared_prefixes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tuning:
    """The parts of a training that a stage adds. Each rank makes them once it has loaded the model.

    trainer: a class derived from `EngineTrainer`, `StepTrainer` and one of TRL's trainers. arguments: TRL's arguments
    for it. rows: the training data; the trainer shuffles them. blank: a row from which nothing is learned. sample:
    conversations on which the drift is measured. metrics: name that TRL logs -> name in metrics.jsonl. data_keys: keys
    of the config that name the data. report: makes the stage's own figures from the metrics of each step. options:
    further keyword arguments of the trainer. held_out: rows on which the loss is measured during the training.
    tiles: those of the pictures of all rows.
    """

    trainer: Any
    arguments: Any
    rows: Sequence[Mapping[str, object]]
    blank: Mapping[str, object]
    sample: Sequence["Example"]
    metrics: Mapping[str, str]
    data_keys: frozenset[str]
    report: Callable[[Sequence[Mapping[str, float]]], dict[str, Any]]
    options: Mapping[str, object] = field(default_factory=dict)
    held_out: Sequence[Mapping[str, Any]] = ()
    tiles: "PictureTiles | None" = None


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage sends to every rank.

    make: a function; `make(config, context, model, data=data, held_out=held_out)` returns the `Tuning`. data, held_out:
    the stage's tokenized rows, and those that are not trained on. files: the actor that writes for ranks on other hosts
    (`HomeFiles`); None in a local session.
    """

    make: Callable[..., Tuning]
    tokenizer: Tokenizer
    data: Sequence[object]
    held_out: Sequence[object] = ()
    files: Any = None


def tune(config: Any, context: StageContext, work: Work) -> dict[str, Any]:
    """Train on the ranks that `config.parallel` asks for, and write `model/` into the stage's folder.

    config: of SFT or DPO. Returns the report of `train_and_export`. Raises `ConfigError` if the model cannot be trained
    as the config asks, and `StageError` if the training fails or a rank is lost.
    """
    from posttrain.parallel.ranks import run_on_ranks

    if continues(config.model):
        check_adapter(config.model.path)
    lora = started_lora(config.model, config.lora, getattr(config, "images", None))
    given = {**config.model_dump(), "lora": None if lora is None else lora.model_dump()}
    config = validate_config(type(config), given, context.name)
    context.phase(f"starting ranks, which load the model: {config.parallel.processes}")
    config, context = absolute(config, context)
    for name in (TRAINED, HELD_OUT):  # of an earlier training that was killed
        shutil.rmtree(context.dir / ROWS / name, ignore_errors=True)
    with home_files(context) as files:
        work = replace(work, files=files)
        report = run_on_ranks(config.parallel, config.resources.trainer, train_and_export, config, context, work)
    shutil.rmtree(context.dir / ROWS, ignore_errors=True)
    return report


def train_and_export(config: Any, context: StageContext, work: Work) -> dict[str, Any]:
    """Load the model, train it, measure its drift and write its folder. Every rank calls it with the same arguments.

    Returns {"steps", "loss_first", "loss_last", "kl_from_start", "entropy_before", "entropy_after", the stage's own
    figures, those of the held-out rows, "engine": the class of the engine, and the keys of `parallel`}.
    """
    with stage_here(config, context, work.files) as here:
        return _train_and_export(here, work)


def _train_and_export(here: "StageHere", work: Work) -> dict[str, Any]:
    import torch

    from posttrain.model.load import load_policy
    from posttrain.model.vision.parts import freeze
    from posttrain.parallel.adapters import with_adapters
    from posttrain.parallel.export import export_model, is_first_rank
    from posttrain.tune.settings import prepare_model, quiet_environment

    config, context = here.config, here.context
    quiet_environment()
    torch.manual_seed(context.seed)  # adapters start from random weights
    images = getattr(config, "images", None)
    model = load_policy(config.model, images=images is not None)
    if images is not None:
        freeze(model, images.freeze)
    prepare_model(model)
    model_config = copy.deepcopy(model.config)  # a copy, because TRL changes values in the model's config
    if continues(config.model):
        model = with_adapters(model, config.model.path, trainable=True, dropout=config.lora.dropout)
    data, held_out = here.rows(work.data), here.rows(work.held_out)
    tuning = work.make(config, context, model, data=data, held_out=held_out)
    trained, report = _train(here, model, tuning, tokenizer=work.tokenizer)
    if config.lora is None or config.lora.save != "adapter":
        architecture = type(trained).__name__.removeprefix("Native")
        export_model(
            trained,
            model_config,
            architecture,
            tokenizer=work.tokenizer,
            path=context.dir / "model",
            processor=None if images is None else base_folder(config.model.path),
        )
        if is_first_rank():
            here.give(context.dir / "model")
    return report


def _train(here: "StageHere", model: Any, tuning: Tuning, *, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Train, and write the adapters if the config asks for them.

    Returns this rank's part of the trained model, with adapters added into its weights, and the report.
    """
    from posttrain.parallel.adapters import export_adapter
    from posttrain.parallel.engine import engine_report
    from posttrain.parallel.export import is_first_rank, without_adapters
    from posttrain.tune.adapters import adapter_folder
    from posttrain.tune.checkpoints import digest_ids, fingerprint
    from posttrain.tune.drift import DriftProbe
    from posttrain.tune.dropout import use_row_dropout
    from posttrain.tune.loop import train

    config, context = here.config, here.context
    probe = DriftProbe(model, tuning.sample, tiles=tuning.tiles)
    recipe = training_recipe(config, tuning.data_keys)
    identity = fingerprint(model, recipe, context.seed, digest_ids(tuning.rows), digest_ids(tuning.held_out))
    folder, leads_host = folder_of_host(context.dir / ROWS)

    def shared(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
        return _shared_rows(rows, tuning.blank, folder / name, writes=leads_host)

    trainer = tuning.trainer(
        model=model,
        args=tuning.arguments,
        train_dataset=shared(tuning.rows, TRAINED),
        eval_dataset=shared(tuning.held_out, HELD_OUT) if tuning.held_out else None,
        processing_class=tokenizer,
        # Adapters that are continued are in the model already.
        peft_config=_adapters(model, config) if config.lora and not continues(config.model) else None,
        leads_host=leads_host,
        **tuning.options,
        **_picture_options(config, tuning),
    )
    if config.lora and config.lora.dropout:
        trainer.row_keys = use_row_dropout(trainer.model, context.seed)
    result = train(
        trainer,
        here,
        tuning.metrics,
        fingerprint=identity,
        router_bias_rate=config.model.router.bias_rate,
        held_out=config.held_out,
    )
    history = result.history
    steps = trainer.state.global_step
    if steps == 0:
        raise StageError(f"{context.name}: no optimizer step was made")
    if (adapter := adapter_folder(config.lora)) is not None:
        base, path = base_folder(config.model.path), context.dir / adapter
        export_adapter(trainer.model, base, tokenizer=tokenizer, path=path, named=here.base)
        if is_first_rank():
            here.give(path)
    trained = without_adapters(trainer.model)
    drift = probe.measure(trained)
    figures = {
        **tuning.report(history),
        "loss_first": here.files.first_loss() if is_first_rank() else None,
        "loss_last": history[-1]["loss"] if history else None,
        "kl_from_start": drift.kl,
        "entropy_before": drift.entropy_before,
        "entropy_after": drift.entropy_after,
        **(result.held_out.report(steps) if result.held_out is not None else {}),
        **engine_report(trainer.model_wrapped, config.parallel),
    }
    if is_first_rank():
        context.metrics(steps, figures)
    return trained, {"steps": steps, **figures}


def _adapters(model: Any, config: Any) -> Any:
    """The `peft.LoraConfig` of a training. A part of the model that is frozen gets no adapters."""
    from posttrain.tune.adapters import adapter_config

    images = getattr(config, "images", None)
    return adapter_config(model, config.lora, () if images is None else images.freeze)


def _picture_options(config: Any, tuning: Tuning) -> dict[str, Any]:
    """Keyword arguments of a `PictureTrainer`; empty for a training on text."""
    if tuning.tiles is None:
        return {}
    return {"tiles": tuning.tiles, "learning_rates": config.images.learning_rates}


def training_recipe(config: Any, data_keys: frozenset[str]) -> dict[str, Any]:
    """The settings of a config that decide what a training learns, besides the start weights and the data.

    A training continues from a checkpoint of any layout if each step has as many forwards as in that layout.
    """
    left_out = dict.fromkeys(NOT_IN_RECIPE | data_keys, True)
    left_out |= {"held_out": {"fraction", "rows", "path", "patience"}, "images": {"root", "max_images"}}
    recipe = config.model_dump(mode="json", exclude=left_out)
    if recipe["lora"] is not None:
        del recipe["lora"]["save"]
    forwards = config.parallel.processes * config.gradient_accumulation
    return {**recipe, "router": config.model.router.model_dump(), "forwards_a_step": forwards}


def _shared_rows(rows: Sequence[Mapping[str, Any]], blank: Mapping[str, Any], folder: Path, *, writes: bool) -> Any:
    """The dataset, read from a folder that one rank of this host writes: this one, or another.

    A shared folder is needed because TRL adds columns to the dataset on disk, which the other ranks of a host read.
    """
    from datasets import load_from_disk

    from posttrain.parallel.export import barrier
    from posttrain.tune.steps import rows_and_blank

    if writes:
        folder.parent.mkdir(exist_ok=True)
        rows_and_blank(rows, blank, folder.parent).save_to_disk(folder)
    barrier()
    return load_from_disk(folder)
