"""The stage `sft`: light supervised fine-tuning with TRL's SFTTrainer.

The stage's process reads and checks every row, tokenizes it, and compares the result with what sampling would send. The
rest is done by `posttrain.tune` on ranks: load the model, check that it keeps packed conversations apart, train on
assistant tokens, measure the loss on held-out rows and how far the model moved, write the model folder.
Left out: evaluation by a reward (a stage of its own).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.data.held_out import check_apart, content_key, prompt_key, split
from posttrain.data.images.render import for_template
from posttrain.data.images.section import STORE, image_reader, passing_reader, pictures_for
from posttrain.data.images.take import ImageReader
from posttrain.data.rows import store_rows
from posttrain.model.adapter import base_folder
from posttrain.model.adapter_start import started_lora
from posttrain.records import Row
from posttrain.sft.config import SftConfig
from posttrain.tune.home import ROWS
from posttrain.tune.run import Tuning, Work, tune

METRICS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
}


def run(config: SftConfig, context: StageContext) -> dict[str, Any]:
    """Fine-tune a model and write its folder.

    Returns {"model": folder, "rows", "dropped", "samples", "rows_by_capability", "steps", "tokens" and "trained_tokens"
    (seen over all epochs), "loss_first", "loss_last", "kl_from_start", "entropy_before", "entropy_after", "engine", and
    the keys of `parallel`}. Raises `DataError` for bad rows, before a model is loaded, `ConfigError` if the model
    cannot be trained as the config asks, and `StageError` if training fails.
    """
    prepared = prepare(config, context)
    examples, counts = prepared.examples, prepared.counts
    context.event("data", **counts, tokens=sum(len(item.ids) for item in examples))
    report = tune(config, context, Work(make_tuning, prepared.tokenizer, examples, prepared.held_out))
    return {"model": str(context.dir / "model"), **counts, **report}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a training. examples, held_out: `Example`s that are trained on, and those that are not.

    counts: {"rows", "dropped": how many were too long, "samples": how many the others became, "rows_by_capability"},
    "pictures" (different ones) if the config asks for them, and "held_out_rows" if any are.
    """

    tokenizer: Any
    examples: Sequence[Any]
    held_out: Sequence[Any]
    counts: dict[str, Any]


def read_rows(
    config: SftConfig, context: StageContext | None = None, images: ImageReader | None = None
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(rows that are trained on, rows that are held out). Raises `DataError` for a bad row.

    images: takes the pictures of rows, if the config asks for them.
    """
    rows = store_rows(config.data, kind="supervised", stage="sft", context=context, images=images)
    apart = config.held_out
    if apart is None:
        return rows, []
    if apart.path is not None:
        own = config.data.model_copy(update={"path": apart.path, "limit": None, "weights": None})
        others = store_rows(own, kind="supervised", stage="sft", context=context, images=images)
        check_apart(rows, others, lambda row: (row.id, content_key(row.messages)))
        return rows, others
    return split(rows, (prompt_key(row.messages) for row in rows), apart)


def prepare(config: SftConfig, context: StageContext | None = None) -> Prepared:
    """Read, check and tokenize every row. Raises `DataError` for a bad row, and for one that is too long.

    context: of the stage, whose folder keeps the pictures of rows; None keeps none.
    """
    kept = passing_reader(config.images) if context is None else nullcontext(image_reader(config.images, context.dir))
    with kept as reader:
        return _prepare(config, context, reader)


def _prepare(config: SftConfig, context: StageContext | None, reader: ImageReader | None) -> Prepared:
    from posttrain.parallel.engine import check_parallel

    lora = started_lora(config.model, config.lora, config.images)
    check_parallel(config.parallel, config.model, lora)
    rows, apart = read_rows(config, context, reader)
    from posttrain.data.chat import check_special_tokens
    from posttrain.data.ends import note_added_end
    from posttrain.data.turns import tools_of
    from posttrain.model.router_keys import check_router
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.sft.examples import tokenize

    check_router(config.model)
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    pictures = pictures_for(reader and reader.store, base_folder(config.model.path), tokenizer)
    note_added_end(tokenizer, context)
    named = ((f"row {row.id!r}", for_template(row.messages), tools_of(row.fields)) for row in chain(rows, apart))
    check_special_tokens(tokenizer, config.data, named)
    folder = context and context.dir / ROWS

    def tokenized(those: Sequence[Row], name: str) -> tuple[Sequence[Any], int]:
        limits = {"overlong": config.overlong, "pictures": pictures, "folder": folder, "name": folder and name}
        return tokenize(tokenizer, those, config.max_length, **limits) if those else ([], 0)

    examples, dropped = tokenized(rows, "examples.arrow")
    held_out, dropped_apart = tokenized(apart, "examples_held_out.arrow")
    by_capability = dict(sorted(Counter(row.capability for row in rows).items()))
    counts = {
        "rows": len(rows),
        "dropped": dropped + dropped_apart,
        "samples": len(examples),
        "rows_by_capability": by_capability,
        **({"pictures": _shown([*examples, *held_out])} if pictures is not None else {}),
    }
    return Prepared(tokenizer, examples, held_out, {**counts, **({"held_out_rows": len(apart)} if apart else {})})


def _shown(examples: Sequence[Any]) -> int:
    """How many different pictures the examples show."""
    return len({key for item in examples for key in item.pictures})


def trainer_arguments(config: SftConfig, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig`, without those of the engine. folder: the stage's."""
    from posttrain.tune.settings import common_arguments

    return {
        **common_arguments(
            config.optimizer,
            checkpoints=folder / "checkpoints",
            epochs=config.epochs,
            batch_size=config.rows_of_a_batch,
            gradient_accumulation=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
            dtype=config.model.dtype,
        ),
        "packing": config.packing,
        "packing_strategy": "bfd",  # with this value TRL makes position ids that restart at each conversation
        "max_length": config.row_tokens,
        # The rows are already tokenized, checked for length and packed.
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def make_tuning(
    config: SftConfig, context: StageContext, model: Any, *, data: Sequence[Any], held_out: Sequence[Any] = ()
) -> Tuning:
    """The `Tuning` of SFT. data, held_out: `Example`s.

    With packing, the model is checked first: it must keep packed conversations apart.
    """
    from trl.trainer.sft_config import SFTConfig

    from posttrain.parallel.export import is_first_rank
    from posttrain.sft.isolation import require_isolation
    from posttrain.sft.packing import blank_record, to_records
    from posttrain.sft.trainer import RowTrainer
    from posttrain.tune.drift import drift_sample
    from posttrain.tune.pictures import stage_tiles
    from posttrain.tune.settings import engine_arguments

    tiles = stage_tiles(config, context.dir / STORE)
    has_images = tiles is not None
    if config.packing:
        difference = require_isolation(model, data, tiles)
        if is_first_rank():
            context.event("packing_checked", difference=difference)
    counts = {
        "tokens": config.epochs * sum(len(item.ids) for item in data),
        "trained_tokens": config.epochs * sum(sum(item.mask) for item in data),
    }

    def report(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return counts

    return Tuning(
        trainer=RowTrainer,
        arguments=SFTConfig(
            **trainer_arguments(config, context.dir, context.seed),
            **engine_arguments(config.parallel, config.optimizer, config.model.dtype, model=model),
        ),
        rows=to_records(data, config.row_tokens, context.seed, images=has_images),
        blank=blank_record(data[0], packed=config.packing, images=has_images),
        sample=drift_sample(data, context.seed),
        metrics=METRICS,
        data_keys=frozenset({"data"}),
        report=report,
        held_out=to_records(held_out, config.row_tokens, context.seed, images=has_images),
        tiles=tiles,
    )
