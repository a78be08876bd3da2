"""Light supervised fine-tuning with TRL's SFTTrainer on rows that are tokenized here.

In order: read and check every row, tokenize and compare with what sampling would send, load the model, check that
packing isolates, train on assistant tokens only, measure how far the model moved, export a plain model folder.
With `parallel` the training runs in ranks of its own, each with a DeepSpeed engine; else in this process.
Left out: evaluation (a stage of its own).
"""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.data.rows import load_rows
from posttrain.errors import StageError
from posttrain.sft.config import SftConfig

METRICS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
}


def run(config: SftConfig, context: StageContext) -> dict[str, Any]:
    """Fine-tune and export.

    Returns {"model": folder, "rows", "dropped", "rows_by_capability", "steps", "tokens" and "trained_tokens" (seen
    over all epochs), "loss_first", "loss_last", "kl_from_start", "entropy_before", "entropy_after"}. Raises
    `DataError` before a model is loaded, `ConfigError` for a model that cannot be trained as asked, `StageError` for a
    training that failed.
    """
    tokenizer, examples, counts = prepare(config)
    context.event("data", **counts, tokens=sum(len(item.ids) for item in examples))
    if config.parallel is None:
        report = train_and_export(config, context, tokenizer, examples)
    else:
        from posttrain.parallel.ranks import run_on_ranks

        work = (train_and_export, config, context, tokenizer, examples)
        report = run_on_ranks(config.parallel, config.resources.trainer, *work)
    return {"model": str(context.dir / "model"), **counts, **report}


def train_and_export(
    config: SftConfig, context: StageContext, tokenizer: Any, examples: Sequence[Any]
) -> dict[str, Any]:
    """Load, train and write the model folder; in each of the ranks, where there are several. Returns the report."""
    from posttrain.model.load import load_policy
    from posttrain.train.trl_loop import own_context, save_trained
    from posttrain.train.trl_settings import quiet_environment

    quiet_environment()
    context = own_context(context)
    model = load_policy(config.model)
    trained, report = train_model(config, context, model, tokenizer, examples)
    save_trained(trained, tokenizer, context.dir / "model", config.parallel)
    return report


def prepare(config: SftConfig) -> tuple[Any, list[Any], dict[str, Any]]:
    """Read and check every row: (tokenizer, `Example`s, {"rows", "dropped" as too long, "rows_by_capability"})."""
    from posttrain.parallel.engine import check_parallel

    check_parallel(config.parallel, config.model, config.lora)
    rows = load_rows(config.data, kind="supervised", stage="sft")
    from posttrain.train.trl_settings import quiet_environment

    quiet_environment()
    from posttrain.model.load import check_router, load_tokenizer
    from posttrain.sft.examples import tokenize

    check_router(config.model)
    tokenizer = load_tokenizer(config.model.path)
    examples, dropped = tokenize(tokenizer, rows, config.max_length, config.overlong)
    by_capability = dict(sorted(Counter(row.capability for row in rows).items()))
    return tokenizer, examples, {"rows": len(rows), "dropped": dropped, "rows_by_capability": by_capability}


def build_arguments(config: SftConfig, folder: Path, seed: int = 0) -> Any:
    """The `trl.SFTConfig` of a stage whose folder is `folder`."""
    from trl.trainer.sft_config import SFTConfig

    from posttrain.train.trl_settings import common_arguments

    return SFTConfig(
        **common_arguments(
            config.optimizer,
            checkpoints=folder / "checkpoints",
            epochs=config.epochs,
            batch_size=config.batch_size or 1,
            gradient_accumulation=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
            parallel=config.parallel,
            dtype=config.model.dtype,
        ),
        packing=config.packing,
        packing_strategy="bfd",  # with it TRL gives the model position ids that restart at each conversation
        max_length=config.batch_tokens,
        # Rows are tokenized, cut to length and packed already.
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def train_model(
    config: SftConfig, context: StageContext, model: Any, tokenizer: Any, examples: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """Train a loaded model on `Example`s; returns the plain model (adapters merged in) and the report."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    from posttrain.parallel.engine import engine_report
    from posttrain.sft.isolation import require_isolation
    from posttrain.sft.packing import to_records
    from posttrain.train.adapters import adapter_config
    from posttrain.train.drift import DriftProbe
    from posttrain.train.trl_checkpoints import digest_ids, fingerprint
    from posttrain.train.trl_loop import train, trained_model, trainer_class_for, training_recipe
    from posttrain.train.trl_settings import prepare_model

    prepare_model(model)
    if config.packing:
        context.event("packing_checked", difference=require_isolation(model, examples))
    probe = DriftProbe(model, random.Random(context.seed).sample(list(examples), len(examples)))
    recipe = training_recipe(config, {"data"})
    print_ = fingerprint(model, recipe, context.seed, digest_ids([item.ids, item.mask] for item in examples))
    model_config = copy.deepcopy(model.config)  # TRL writes its own ideas into the model's config
    trainer = trainer_class_for(SFTTrainer, config.parallel)(
        model=model,
        args=build_arguments(config, context.dir, context.seed),
        train_dataset=Dataset.from_list(to_records(examples, config.batch_tokens, context.seed)),
        processing_class=tokenizer,
        peft_config=adapter_config(model, config.lora) if config.lora else None,
    )
    history = train(trainer, context, "sft", METRICS, print_, config.model.router.bias_rate)
    if trainer.state.global_step == 0:
        raise StageError("sft: no optimiser step was made")
    trained = trained_model(trainer, model_config, config.parallel)
    drift = probe.measure(trained)
    report = {
        "steps": trainer.state.global_step,
        "tokens": config.epochs * sum(len(item.ids) for item in examples),
        "trained_tokens": config.epochs * sum(sum(item.mask) for item in examples),
        "loss_first": history[0]["loss"] if history else None,
        "loss_last": history[-1]["loss"] if history else None,
        "kl_from_start": drift.kl,
        "entropy_before": drift.entropy_before,
        "entropy_after": drift.entropy_after,
        **engine_report(trainer.model_wrapped, config.parallel),
    }
    context.metrics(trainer.state.global_step, {name: value for name, value in report.items() if name != "steps"})
    return trained, report
