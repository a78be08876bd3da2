"""The RL stage: profile the prompts, select those of medium to hard difficulty, train on them, write the policy."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.data.chat import check_special_tokens, render_row
from posttrain.data.ends import end_token_ids, note_added_end
from posttrain.data.rows import load_rows
from posttrain.data.shown import Tools
from posttrain.data.strata import hash_order
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.episodes.tools import row_renderer, row_tools
from posttrain.errors import TrainerLostError
from posttrain.judging.backend import PreparedJudge, open_judge, prepare_judge
from posttrain.model.sharing import note_unshared
from posttrain.parallel.engine import check_parallel
from posttrain.records import DrawnPrompt, Message, Prompt, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.judge import Judge
from posttrain.rl.grading.verifiers import check_rewardable
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import MODEL, commit_result, finished_outputs, open_ledger
from posttrain.rl.loop.adapter_check import check_adapters
from posttrain.rl.loop.controller import Controller, Parts
from posttrain.rl.loop.evaluation import heldout_prompts, heldout_rows
from posttrain.rl.loop.parity import allowed_gap, check_engine_parity
from posttrain.rl.loop.resume import resume
from posttrain.rl.loop.tally import unscored_totals
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.prompts.curriculum import Curriculum
from posttrain.rl.prompts.fingerprints import check_resumed, run_fingerprints
from posttrain.rl.prompts.lengths import check_room
from posttrain.rl.prompts.prior import fit_prior
from posttrain.rl.prompts.profile import Difficulty, drawn_rows, profile_figures, profile_prompts, select_band
from posttrain.rl.prompts.quotas import mixture_shares
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.reference import AdaptersOff, Reference, check_reference
from posttrain.sampling.client import Engines


def run(config: RlConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage; returns its outputs and figures."""
    check_parallel(config.parallel, config.model, config.lora)
    rows, heldout = _rows_to_profile(config, context.seed, context), heldout_rows(config, config.evaluation, context)
    mixture_shares(rows, config.mixture, "prompt")  # a capability that no row has is found before anything starts
    if (finished := finished_outputs(context.dir, config.steps)) is not None:
        return finished
    from posttrain.model.router_keys import check_router

    check_router(config.model)
    if config.shared_prefixes:
        note_unshared(config.model, context)
    tokenizer, prompts, evaluated = _render(config, rows, heldout)
    note_added_end(tokenizer, context)
    stop_ids = tuple(end_token_ids(tokenizer))
    check_reference(config.loss.reference, config.model)
    rollouter = partial(_rollouter, config, tokenizer, context.seed)  # each event loop has its own
    prepared = prepare_judge(config.judge) if config.judge is not None else None
    with ExitStack() as models:
        engines = models.enter_context(
            Engines(context, config.model, config.engine, resources=config.resources.rollout)
        )
        judge = _start_judge(prepared, config.resources.judge, context, models=models)
        trainer = TrainerClient(config, context.seed)  # beside the profile
        try:
            order = list(prompts)
            random.Random(context.seed).shuffle(order)
            difficulties = profile_prompts(
                config, context, engines, prompts=order, stop_ids=stop_ids, judge=judge, rollouter=rollouter()
            )
        except BaseException:
            trainer.close(at_once=True)
            raise
        profile = profile_figures(context.dir)
        selected = select_band(difficulties, rows, config.profile.band)
        shares = mixture_shares(selected, config.mixture)
        drawn = drawn_rows(config, difficulties, rows)
        reference = Reference(config, context.seed) if config.resources.reference is not None else None
        ledger = open_ledger(context.dir)
        try:
            _check_same(ledger, config.model.path, rows, context=context)
            for left in restarts_left(config):
                source = prompt_source(
                    config, drawn, difficulties, tokenizer=tokenizer, seed=context.seed, steps=config.steps
                )
                archive = RolloutArchive(context.dir / "rollouts", tokenizer)
                own = AdaptersOff(trainer) if reference is None and config.loss.reference is not None else None
                parts = Parts(
                    engines, trainer, reference or own, source, shares, archive, ledger, stop_ids, evaluated, judge,
                    difficulties, profile["prompts_unscored"], rollouter(),
                )  # fmt: skip
                try:
                    figures = _train(config, context, parts, prompts=prompts)
                    break
                except TrainerLostError as error:
                    if not left:
                        raise
                    context.event("trainer_restarted", reason=str(error), restarts_left=left - 1)
                    trainer.close(at_once=True)
                    trainer = TrainerClient(config, context.seed)
            outputs = {
                "profiled_prompts": len(difficulties),
                "profile": profile,
                "selected_prompts": len(selected),
                "selected_by_capability": dict(Counter(row.capability for row in selected)),
                **figures,
            }
            ledger.set_fact("outputs", outputs)
            asyncio.run(commit_result(context.dir, ledger))
            return outputs
        finally:
            ledger.close()
            trainer.close()
            if reference is not None:
                reference.close()


def _render(
    config: RlConfig, rows: Sequence[Row], heldout: Sequence[Row]
) -> tuple[Tokenizer, list[DrawnPrompt], list[DrawnPrompt]]:
    """The policy's tokenizer, and what it makes of the prompts to train on and of those to evaluate on."""
    from posttrain.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    _check_special_tokens(tokenizer, config, rows, heldout=heldout)
    prompts = _draw_plain(rows, tokenizer, config)
    return tokenizer, prompts, heldout_prompts(config, heldout, row_renderer(tokenizer, config.environment))


def _check_special_tokens(
    tokenizer: Tokenizer, config: RlConfig, rows: Sequence[Row], *, heldout: Sequence[Row]
) -> None:
    evaluated = config.evaluation.data if config.evaluation is not None else config.prompts
    for data, those in ((config.prompts, rows), (evaluated, heldout)):
        check_special_tokens(tokenizer, data, _texts(config, those))


def _rollouter(config: RlConfig, tokenizer: Tokenizer, seed: int) -> EnvironmentRollouter | None:
    if config.environment is None:
        return None
    return EnvironmentRollouter(config.environment, tokenizer, length=config.engine.length, seed=seed)


def _texts(config: RlConfig, rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Message], Tools]]:
    return ((f"row {row.id!r}", row.messages, row_tools(config.environment, row) or None) for row in rows)


def _rows_to_profile(config: PromptsConfig, seed: int, context: StageContext | None = None) -> list[Row]:
    """The prompts, or a seeded subset of them spread evenly over the capabilities."""
    rows = load_rows(config.prompts, kind="prompt", stage="rl", context=context)
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


def _draw_plain(rows: Sequence[Row], tokenizer: Tokenizer, config: GradingConfig) -> list[DrawnPrompt]:
    """Each row as a prompt without a system instruction. Raises DataError if one leaves no room for a reply."""
    render = row_renderer(tokenizer, config.environment)
    prompts = [DrawnPrompt(row, None, Prompt(row.messages, render_row(render, row))) for row in rows]
    check_room(
        prompts,
        render,
        config.systems.instructions,
        max_tokens=config.sampling.max_tokens,
        max_model_len=config.engine.length,
    )
    return prompts


def _start_judge(
    prepared: PreparedJudge | None, resources: ActorResources | None, context: StageContext, *, models: ExitStack
) -> Judge | None:
    """Start the judge on engines with `resources`, or connect to its endpoint. None for a stage without a judge."""
    if prepared is None:
        return None
    backend = models.enter_context(open_judge(prepared, context, resources))
    return Judge(prepared, backend)


def restarts_left(config: TrainingConfig) -> range:
    """For each start of the trainer, how many more times it may be started again."""
    return range(config.trainer_restarts, -1, -1)


def _check_same(ledger: Ledger, model_path: str, rows: Sequence[Row], *, context: StageContext) -> None:
    """Raise CheckpointError if the run began with another dataset or another model."""
    now = run_fingerprints(model_path, rows)
    if (saved := ledger.fact("fingerprints")) is not None:
        check_resumed(saved, now, context.dir)
    ledger.set_fact("fingerprints", now)
    ledger.set_fact("seed", context.seed)
    ledger.flush_now()


def _train(config: RlConfig, context: StageContext, parts: Parts, *, prompts: list[DrawnPrompt]) -> dict[str, Any]:
    """Train from the last commit to the last step, and write the policy. Returns outputs and figures of the stage."""
    context.phase("waiting for the trainer")
    first_step, left = resume(config, context, parts)
    tolerance = allowed_gap(config.parity_tolerance, config.model.dtype)
    if config.lora is not None:
        context.phase("checking that engines get the adapters")
        effect = check_adapters(
            config,
            context,
            parts.engines,
            trainer=parts.trainer,
            prompts=prompts,
            stop_ids=parts.stop_ids,
            version=first_step,
            tolerance=tolerance,
        )
        context.event("adapters_checked", effect=effect)
    manifest = parts.trainer.publish()
    context.phase("comparing the log-probabilities of engines and trainer")
    parity = check_engine_parity(
        config,
        context,
        parts.engines,
        trainer=parts.trainer,
        prompts=prompts,
        stop_ids=parts.stop_ids,
        manifest=manifest,
        version=first_step,
        tolerance=tolerance,
    )
    context.event("parity", mean_gap=parity.mean_gap, max_gap=parity.max_gap, tokens=parity.num_tokens)
    context.phase("sampling the first batch")
    controller = Controller(config, context, parts, manifest=manifest, first_step=first_step, survivors=left)
    asyncio.run(controller.run())
    controller.finish()
    parts.trainer.save_result(context.dir, config.lora)
    return {
        "model": str(context.dir / MODEL),
        "rollouts": str(context.dir / "rollouts"),
        "steps": config.steps,
        "parity_mean_gap": parity.mean_gap,
        "unscored_replies": unscored_totals(context.dir),
        **parts.trainer.report(),
    }


def prompt_source(
    config: PromptsConfig,
    selected: Sequence[Row],
    difficulties: Sequence[Difficulty],
    *,
    tokenizer: Tokenizer,
    seed: int,
    steps: int,
) -> PromptSource:
    """The source that draws the selected prompts, each with its system instruction, over `steps` optimizer steps."""
    render = row_renderer(tokenizer, config.environment)
    if config.curriculum is None:
        return PromptSource(selected, config.systems, render, seed=seed)
    ids = {row.id for row in selected}
    known = [item for item in difficulties if item.prompt_id in ids]
    curriculum = Curriculum(config.curriculum, known, steps, prior=fit_prior(difficulties))
    return PromptSource(
        selected, config.systems, render, seed=seed, curriculum=curriculum, tries=config.curriculum.tries
    )
