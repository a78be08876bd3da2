"""Light direct preference optimisation with TRL's DPOTrainer, at the end of the recipe.

Pairs are given, or mined from the rollouts of the RL stage. They are tokenized here (TRL's own tokenization is turned
off), the reference is the start policy, frozen, and how far the policy moved is measured and reported.
With `parallel` the training runs in ranks of its own, each with a DeepSpeed engine; else in this process.
Left out: evaluation (a stage of its own).
"""

import copy
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.data.pairs import Pair, load_pairs, write_pairs
from posttrain.dpo.config import DpoConfig
from posttrain.dpo.mine import mine, read_replies
from posttrain.errors import StageError

TOKENIZED = "tokenized"  # the pairs on disk, while ranks read them
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
    """Optimise on preferences and export.

    Returns {"model": folder, "pairs": pairs.jsonl, "num_pairs", "dropped", "reasons", "steps", "tokens", "loss_first",
    "loss_last", "margin", "accuracy" (means over the last quarter of the steps), "kl_from_start", "entropy_before",
    "entropy_after"}. Raises `DataError` before a model is loaded, `StageError` if no pair can be mined or training
    failed.
    """
    tokenizer, ids, kept, dropped = prepare(config, context.seed)
    path = context.dir / "pairs.jsonl"
    write_pairs(path, kept)
    reasons = dict(Counter(str(pair.fields.get("reason", "given")) for pair in kept))
    context.event("pairs", pairs=len(kept), dropped=dropped, reasons=reasons)
    if config.parallel is None:
        report = train_and_export(config, context, tokenizer, ids)
    else:
        from posttrain.parallel.ranks import run_on_ranks

        work = (train_and_export, config, context, tokenizer, ids)
        report = run_on_ranks(config.parallel, config.resources.trainer, *work)
        shutil.rmtree(context.dir / TOKENIZED, ignore_errors=True)
    counts = {"num_pairs": len(kept), "dropped": dropped, "reasons": reasons}
    return {"model": str(context.dir / "model"), "pairs": str(path), **counts, **report}


def train_and_export(config: DpoConfig, context: StageContext, tokenizer: Any, ids: Sequence[Any]) -> dict[str, Any]:
    """Load, train and write the model folder; in each of the ranks, where there are several. Returns the report."""
    from posttrain.model.load import load_policy
    from posttrain.train.trl_loop import own_context, save_trained
    from posttrain.train.trl_settings import quiet_environment

    quiet_environment()
    context = own_context(context)
    model = load_policy(config.model)
    trained, report = train_model(config, context, model, tokenizer, ids)
    save_trained(trained, tokenizer, context.dir / "model", config.parallel)
    return report


def prepare(config: DpoConfig, seed: int) -> tuple[Any, list[Any], list[Pair], int]:
    """Read or mine the pairs and check them: (tokenizer, `PairIds`, their pairs, how many were dropped as too long)."""
    from posttrain.parallel.engine import check_parallel

    check_parallel(config.parallel, config.model, config.lora)
    pairs = read_pairs(config, seed)
    from posttrain.train.trl_settings import quiet_environment

    quiet_environment()
    from posttrain.dpo.examples import tokenize_pairs
    from posttrain.model.load import check_router, load_tokenizer

    check_router(config.model)
    tokenizer = load_tokenizer(config.model.path)
    ids, kept = tokenize_pairs(tokenizer, pairs, config.max_length, config.overlong)
    return tokenizer, ids, kept, len(pairs) - len(kept)


def read_pairs(config: DpoConfig, seed: int) -> list[Pair]:
    """The pairs to train on: a seeded sample of those given, or mined."""
    if config.rollouts is not None:
        return mine(read_replies(config.rollouts), config.mining, config.max_pairs, seed)
    assert config.pairs is not None  # the schema allows exactly one
    pairs = load_pairs(config.pairs, stage="dpo")
    if config.max_pairs is not None and len(pairs) > config.max_pairs:
        pairs = random.Random(seed).sample(pairs, config.max_pairs)
    return pairs


def build_arguments(config: DpoConfig, folder: Path, seed: int = 0) -> Any:
    """The `trl.DPOConfig` of a stage whose folder is `folder`."""
    from trl.trainer.dpo_config import DPOConfig

    from posttrain.train.trl_settings import common_arguments

    return DPOConfig(
        **common_arguments(
            config.optimizer,
            checkpoints=folder / "checkpoints",
            epochs=config.epochs,
            batch_size=config.batch_size,
            gradient_accumulation=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            checkpoint_every=config.checkpoint_every,
            seed=seed,
            parallel=config.parallel,
            dtype=config.model.dtype,
        ),
        beta=config.beta,
        loss_type=[config.loss_type],
        max_length=None,  # pairs are within config.max_length already
        # The start policy's log-probabilities are computed once, before the first step: no second model in memory.
        precompute_ref_log_probs=True,
    )


def train_model(
    config: DpoConfig, context: StageContext, model: Any, tokenizer: Any, ids: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """Train a loaded model on `PairIds`; returns the plain model (adapters merged in) and the report."""
    from datasets import Dataset

    from posttrain.dpo.trainer import TokenizedPairTrainer
    from posttrain.parallel.engine import engine_report
    from posttrain.train.adapters import adapter_config
    from posttrain.train.drift import DriftProbe
    from posttrain.train.trl_checkpoints import digest_ids, fingerprint
    from posttrain.train.trl_loop import (
        shared_dataset,
        train,
        trained_model,
        trainer_class_for,
        training_recipe,
    )
    from posttrain.train.trl_settings import prepare_model

    prepare_model(model)
    records = [{"prompt_ids": i.prompt_ids, "chosen_ids": i.chosen_ids, "rejected_ids": i.rejected_ids} for i in ids]
    sample = random.Random(context.seed).sample(list(ids), len(ids))
    probe = DriftProbe(model, [item.chosen_example() for item in sample])
    recipe = training_recipe(config, {"pairs", "rollouts"})
    print_ = fingerprint(model, recipe, context.seed, digest_ids(records))
    model_config = copy.deepcopy(model.config)  # TRL writes its own ideas into the model's config
    trainer = trainer_class_for(TokenizedPairTrainer, config.parallel)(
        model=model,
        args=build_arguments(config, context.dir, context.seed),
        train_dataset=shared_dataset(Dataset.from_list(records), context.dir / TOKENIZED),
        processing_class=tokenizer,
        peft_config=adapter_config(model, config.lora) if config.lora else None,
        nll_weight=config.nll_weight,
    )
    history = train(trainer, context, "dpo", METRICS, print_, config.model.router.bias_rate)
    if trainer.state.global_step == 0:
        raise StageError("dpo: no optimiser step was made")
    trained = trained_model(trainer, model_config, config.parallel)
    report = {
        **_report(trainer.state, history, probe.measure(trained)),
        **engine_report(trainer.model_wrapped, config.parallel),
    }
    context.metrics(trainer.state.global_step, {name: value for name, value in report.items() if name != "steps"})
    return trained, report


def _report(state: Any, history: Sequence[dict[str, float]], drift: Any) -> dict[str, Any]:
    last = history[-max(1, len(history) // 4) :]
    means = {name: sum(h[name] for h in last) / len(last) if last else None for name in ("margin", "accuracy")}
    return {
        "steps": state.global_step,
        "tokens": int(history[-1]["tokens"]) if history else None,
        "loss_first": history[0]["loss"] if history else None,
        "loss_last": history[-1]["loss"] if history else None,
        **means,
        "kl_from_start": drift.kl,
        "entropy_before": drift.entropy_before,
        "entropy_after": drift.entropy_after,
    }
