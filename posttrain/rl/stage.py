"""The RL stage: profile the prompts, select the medium-to-hard band, train asynchronously, write the policy."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.data.chat import end_token_ids, render_prompt
from posttrain.data.rows import load_rows
from posttrain.data.strata import hash_order
from posttrain.metrics.jsonl import keep_steps_before
from posttrain.parallel.engine import check_parallel
from posttrain.parallel.ranks import RankGroup
from posttrain.records import Message, Row
from posttrain.rl.archive import RolloutArchive
from posttrain.rl.config import RlConfig
from posttrain.rl.controller import Controller
from posttrain.rl.curriculum import Curriculum
from posttrain.rl.groups import DrawnPrompt
from posttrain.rl.lengths import check_room
from posttrain.rl.parity import check_engine_parity
from posttrain.rl.profile import Difficulty, drawn_rows, profile_prompts, select_band
from posttrain.rl.prompts import PromptSource
from posttrain.rl.quotas import mixture_shares
from posttrain.rl.verifiers import check_rewardable
from posttrain.sampling.client import Engines


def run(config: RlConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage; returns its outputs and figures."""
    check_parallel(config.parallel, config.model, None)
    rows = _rows_to_profile(config, context.seed)
    from posttrain.model.load import check_router, load_tokenizer

    check_router(config.model)
    tokenizer = load_tokenizer(config.model.path)
    prompts = _draw_plain(rows, tokenizer, config)
    stop_ids = tuple(end_token_ids(tokenizer))
    with Engines(context, config.model, config.engine, config.resources.rollout) as engines:
        trainer = _start_trainer(config, context.seed)
        try:
            return _train(config, context, engines, trainer, rows, prompts, tokenizer, stop_ids)
        finally:
            trainer.close(last="close")


def _rows_to_profile(config: RlConfig, seed: int) -> list[Row]:
    """The prompts, or a seeded subset of them spread evenly over the capabilities."""
    rows = load_rows(config.prompts, kind="prompt")
    check_rewardable(config, rows)
    limit = config.profile.prompts
    if limit is None or limit >= len(rows):
        return rows
    by_capability: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: hash_order(seed, row.id)):
        by_capability.setdefault(row.capability, []).append(row)
    places = sorted(
        (place / len(group), name, row.id, row)
        for name, group in by_capability.items()
        for place, row in enumerate(group)
    )
    return [row for _, _, _, row in places[:limit]]


def _draw_plain(rows: Sequence[Row], tokenizer: Any, config: RlConfig) -> list[DrawnPrompt]:
    """Each row as a prompt without a sampled system instruction; one that leaves no room for a reply is an error."""

    def render(messages: Sequence[Message]) -> list[int]:
        return render_prompt(tokenizer, messages)

    prompts = [DrawnPrompt(row, None, row.messages, tuple(render(row.messages))) for row in rows]
    check_room(config, prompts, render)
    return prompts


def _start_trainer(config: RlConfig, seed: int) -> RankGroup:
    from posttrain.rl.trainer import PolicyTrainer

    return RankGroup(config.parallel, config.resources.trainer, PolicyTrainer, config, seed)


def _train(
    config: RlConfig,
    context: StageContext,
    engines: Engines,
    trainer: RankGroup,
    rows: list[Row],
    prompts: list[DrawnPrompt],
    tokenizer: Any,
    stop_ids: tuple[int, ...],
) -> dict[str, Any]:
    order = list(prompts)
    random.Random(context.seed).shuffle(order)
    difficulties = profile_prompts(config, context, engines, order, stop_ids)
    selected = select_band(difficulties, rows, config.profile.band)
    shares = mixture_shares(selected, config.mixture)
    source = prompt_source(config, drawn_rows(config, difficulties, rows), difficulties, tokenizer, context.seed)
    first_step = 0
    archive = RolloutArchive(context.dir / "rollouts", tokenizer)
    checkpoint = _latest_checkpoint(context.dir / "checkpoints")
    if checkpoint is not None:
        state: Any = trainer.get("load_checkpoint", str(checkpoint))
        source.restore(state["source"])
        first_step = int(checkpoint.name.removeprefix("step_"))
        archive.forget_after(first_step - 1)
        keep_steps_before(context.dir / "metrics.jsonl", first_step)
        context.event("resumed", step=first_step)
    parity = check_engine_parity(config, engines, trainer, prompts, stop_ids, first_step)
    context.event("parity", mean_gap=parity.mean_gap, max_gap=parity.max_gap, tokens=parity.num_tokens)
    asyncio.run(Controller(config, context, engines, trainer, source, shares, archive, stop_ids, first_step).run())
    trainer.get("save", str(context.dir / "model"))
    return {
        "model": str(context.dir / "model"),
        "rollouts": str(context.dir / "rollouts"),
        "steps": config.steps,
        "profiled_prompts": len(difficulties),
        "selected_prompts": len(selected),
        "selected_by_capability": dict(Counter(row.capability for row in selected)),
        "parity_mean_gap": parity.mean_gap,
        **trainer.get("report"),
    }


def prompt_source(
    config: RlConfig, selected: Sequence[Row], difficulties: Sequence[Difficulty], tokenizer: Any, seed: int
) -> PromptSource:
    """Where prompts are drawn from, each with its system instruction."""

    def render(messages: Sequence[Message]) -> list[int]:
        return render_prompt(tokenizer, messages)

    if config.curriculum is None:
        return PromptSource(selected, config.systems, render, seed)
    ids = {row.id for row in selected}
    curriculum = Curriculum(config.curriculum, [item for item in difficulties if item.prompt_id in ids], config.steps)
    return PromptSource(selected, config.systems, render, seed, curriculum, config.curriculum.tries)


def _latest_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    return found[-1] if found else None
