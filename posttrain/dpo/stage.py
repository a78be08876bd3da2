"""The stage `dpo`: light direct preference optimization with TRL's DPOTrainer, at the end of the recipe.

The stage's process reads the pairs, or mines them from the rollouts of an RL stage, and tokenizes them; TRL's own
tokenization is turned off. The rest is done by `posttrain.tune` on ranks: load the model, train, measure how far the
policy moved, write the model folder. The reference is the start policy, frozen. Some pairs may be held out to measure
the training.
Left out: evaluation by a reward (a stage of its own).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.context import StageContext
from posttrain.data.held_out import check_apart, content_key, prompt_key, split
from posttrain.data.images.render import for_template, pictures_of
from posttrain.data.images.section import STORE, image_reader, passing_reader, pictures_for
from posttrain.data.images.take import ImageReader
from posttrain.data.pairs import Pair, store_pairs, write_pairs
from posttrain.data.stored import Derived
from posttrain.dpo.config import DpoConfig
from posttrain.dpo.mine import mine, read_replies
from posttrain.errors import DataError
from posttrain.model.adapter import base_folder
from posttrain.model.adapter_start import started_lora
from posttrain.tune.home import ROWS
from posttrain.tune.run import Tuning, Work, tune

METRICS = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
}


def run(config: DpoConfig, context: StageContext) -> dict[str, Any]:
    """Train on preference pairs and write the model folder.

    Returns {"model": folder, "pairs": pairs.jsonl, "num_pairs", "dropped", "reasons", "steps", "tokens", "loss_first",
    "loss_last", "margin", "accuracy" (means over the last quarter of the steps), "kl_from_start", "entropy_before",
    "entropy_after", "engine", and the keys of `parallel`}. Raises `DataError` for bad pairs, before a model is loaded,
    `ConfigError` if the model cannot be trained as the config asks, and `StageError` if no pair can be mined or
    training fails.
    """
    prepared = prepare(config, context.seed, context)
    path = context.dir / "pairs.jsonl"
    write_pairs(path, prepared.pairs)
    reasons = dict(Counter(str(pair.fields.get("reason", "given")) for pair in prepared.pairs))
    counts = {"dropped": prepared.dropped, "reasons": reasons}
    if prepared.held_out:
        counts["held_out_pairs"] = len(prepared.held_out)
    context.event("pairs", pairs=len(prepared.pairs), **counts)
    report = tune(config, context, Work(make_tuning, prepared.tokenizer, prepared.ids, prepared.held_out))
    counts["num_pairs"] = len(prepared.pairs)
    return {"model": str(context.dir / "model"), "pairs": str(path), **counts, **report}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a training. ids: `PairIds` that are trained on. pairs: from which they were made.

    held_out: `PairIds` that are not trained on. dropped: how many pairs were too long.
    """

    tokenizer: Any
    ids: Sequence[Any]
    pairs: Sequence[Pair]
    held_out: Sequence[Any]
    dropped: int


def prepare(config: DpoConfig, seed: int, context: StageContext | None = None) -> Prepared:
    """Read or mine the pairs, check and tokenize them. Raises `DataError` for a bad pair or one that is too long.

    context: of the stage, whose folder keeps the pictures of pairs; None keeps none.
    """
    if context is None:
        kept = passing_reader(config.images)
    else:
        kept = nullcontext(image_reader(config.images, picture_store(config, context.dir).parent))
    with kept as reader:
        return _prepare(config, seed, context, reader=reader)


def picture_store(config: DpoConfig, folder: Path) -> Path:
    """The file of the pairs' pictures. Those of mined pairs are in the folder of the RL stage. folder: this stage's."""
    return (folder if config.rollouts is None else Path(config.rollouts).expanduser().absolute().parent) / STORE


def _prepare(config: DpoConfig, seed: int, context: StageContext | None, *, reader: ImageReader | None) -> Prepared:
    from posttrain.parallel.engine import check_parallel

    lora = started_lora(config.model, config.lora, config.images)
    check_parallel(config.parallel, config.model, lora)
    pairs, apart = hold_out(config, read_pairs(config, seed, context, images=reader), context, images=reader)
    _check_pictures(pairs, reader)
    from posttrain.data.chat import check_special_tokens
    from posttrain.data.ends import note_added_end
    from posttrain.data.turns import tools_of
    from posttrain.dpo.examples import tokenize_pairs
    from posttrain.model.router_keys import check_router
    from posttrain.model.sharing import note_unshared
    from posttrain.model.tokenizer import load_tokenizer

    check_router(config.model)
    if config.shared_prefixes:
        note_unshared(config.model, context)
    if context is not None and config.shared_prefixes and lora is not None and lora.dropout:
        context.event("prefixes_unshared", reason="lora.dropout is drawn for each token of a reply's own row")
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    note_added_end(tokenizer, context)
    if config.pairs is not None:
        check_special_tokens(
            tokenizer,
            config.pairs,
            ((f"pair {pair.id!r}", for_template(pair.turns), tools_of(pair.fields)) for pair in chain(pairs, apart)),
        )
    folder = context and context.dir / ROWS
    pictures = pictures_for(reader and reader.store, base_folder(config.model.path), tokenizer)
    limits: dict[str, Any] = {"overlong": config.overlong, "folder": folder, "pictures": pictures}

    def tokenized(those: Sequence[Pair], name: str) -> tuple[Sequence[Any], Sequence[Pair]]:
        if not those:
            return [], []
        return tokenize_pairs(tokenizer, those, config.max_length, name=folder and name, **limits)

    ids, kept = tokenized(pairs, "pairs.arrow")
    held_out, kept_apart = tokenized(apart, "pairs_held_out.arrow")
    return Prepared(tokenizer, ids, kept, held_out, len(pairs) - len(kept) + len(apart) - len(kept_apart))


def _check_pictures(pairs: Sequence[Pair], reader: ImageReader | None) -> None:
    """Raise `DataError` for mined pairs with pictures that this stage does not take, or that are not there."""
    for pair in pairs:
        keys = pictures_of(pair.prompt)
        if keys and reader is None:
            raise DataError(f"pair {pair.id!r}: its prompt has pictures; set images: {{}} for a multimodal model")
        if lost := [key for key in keys if reader is not None and key not in reader.store]:
            raise DataError(f"pair {pair.id!r}: picture {lost[0]} is not in {reader and reader.store.path}")


def hold_out(
    config: DpoConfig, pairs: Sequence[Pair], context: StageContext | None = None, *, images: ImageReader | None = None
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """(pairs that are trained on, pairs that are held out). Raises `DataError` for a held-out pair that is in both.

    images: takes the pictures of pairs; None for a stage that takes none.
    """
    apart = config.held_out
    if apart is None:
        return pairs, []
    if apart.path is not None:
        given = config.pairs.model_dump() if config.pairs is not None else {}
        own = DataConfig.model_validate({**given, "path": apart.path, "limit": None, "weights": None})
        others = store_pairs(own, stage="dpo", context=context, images=images)
        check_apart(pairs, others, lambda pair: (pair.id, content_key(pair.turns)))
        return pairs, others
    return split(pairs, (prompt_key(pair.prompt) for pair in pairs), apart)


def read_pairs(
    config: DpoConfig, seed: int, context: StageContext | None = None, *, images: ImageReader | None = None
) -> Sequence[Pair]:
    """The pairs to train on: mined, or those given, of which `max_pairs` are sampled with the seed.

    images: as for `hold_out`.
    """
    if config.rollouts is not None:
        return mine(read_replies(config.rollouts), config.mining, config.max_pairs, seed=seed)
    assert config.pairs is not None  # the schema allows exactly one
    pairs = store_pairs(config.pairs, stage="dpo", context=context, images=images)
    if config.max_pairs is not None and len(pairs) > config.max_pairs:
        pairs = pairs.take(random.Random(seed).sample(range(len(pairs)), config.max_pairs))
    return pairs


def trainer_arguments(config: DpoConfig, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `trl.DPOConfig`, without those of the engine. folder: the stage's."""
    from posttrain.tune.settings import common_arguments

    return {
        **common_arguments(
            config.optimizer,
            checkpoints=folder / "checkpoints",
            epochs=config.epochs,
            batch_size=config.batch_size,
            gradient_accumulation=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
            dtype=config.model.dtype,
        ),
        "beta": config.beta,
        "loss_type": [config.loss_type],
        "max_length": None,  # the pairs were checked against config.max_length before
        # The reference's log-probabilities are computed before the first step, so no second model stays in memory.
        "precompute_ref_log_probs": True,
    }


def trainer_options(config: DpoConfig) -> dict[str, Any]:
    """Keyword arguments of `PairTrainer` that are not TRL's."""
    return {"nll_weight": config.nll_weight, "shared_prefixes": config.shared_prefixes}


def make_tuning(
    config: DpoConfig, context: StageContext, model: Any, *, data: Sequence[Any], held_out: Sequence[Any] = ()
) -> Tuning:
    """The `Tuning` of DPO. data, held_out: `PairIds`."""
    from trl.trainer.dpo_config import DPOConfig

    from posttrain.dpo.examples import PairIds, blank_record, to_record
    from posttrain.dpo.trainer import PairTrainer
    from posttrain.tune.drift import drift_sample
    from posttrain.tune.pictures import stage_tiles
    from posttrain.tune.settings import engine_arguments

    tiles = stage_tiles(config, picture_store(config, context.dir))
    record = partial(to_record, images=tiles is not None)
    return Tuning(
        trainer=PairTrainer,
        arguments=DPOConfig(
            **trainer_arguments(config, context.dir, context.seed),
            **engine_arguments(config.parallel, config.optimizer, config.model.dtype, model=model),
        ),
        rows=Derived(data, record),
        blank=blank_record(data[0], images=tiles is not None),
        sample=Derived(drift_sample(data, context.seed), PairIds.chosen_example),
        metrics=METRICS,
        data_keys=frozenset({"pairs", "rollouts"}),
        report=_report,
        options=trainer_options(config),
        held_out=Derived(held_out, record),
        tiles=tiles,
    )


def _report(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    last = history[-max(1, len(history) // 4) :]
    means = {name: sum(h[name] for h in last) / len(last) if last else None for name in ("margin", "accuracy")}
    return {"tokens": int(history[-1]["tokens"]) if history else None, **means}
