"""The RL stage: start engines and trainer, profile the prompts if that is asked for, train, write the policy."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.data.ends import end_token_ids, note_added_end
from posttrain.data.images.section import image_reader
from posttrain.data.images.store import ImageStore
from posttrain.data.stored import Derived
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.errors import TrainerLostError
from posttrain.judging.backend import PreparedJudge, open_judge, prepare_judge
from posttrain.model.adapter_start import started_lora
from posttrain.model.sharing import note_unshared
from posttrain.parallel.engine import check_parallel
from posttrain.records import DrawnPrompt, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.judge import Judge
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import MODEL, commit_result, finished_outputs, open_ledger
from posttrain.rl.inputs import Inputs, read_inputs, read_rows
from posttrain.rl.loop.adapter_check import check_adapters
from posttrain.rl.loop.controller import Controller
from posttrain.rl.loop.evaluation import heldout_rows
from posttrain.rl.loop.parts import Parts
from posttrain.rl.loop.resume import resume
from posttrain.rl.loop.scaling import Choice
from posttrain.rl.loop.start import allowed_gap
from posttrain.rl.loop.tally import unscored_totals
from posttrain.rl.prompts.band import select_band
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.fingerprints import check_resumed, run_fingerprints
from posttrain.rl.prompts.measured import first_group_figures
from posttrain.rl.prompts.profile import profile_figures, profile_prompts, profiled_places
from posttrain.rl.prompts.quotas import mixture_shares
from posttrain.rl.prompts.source import prompt_source
from posttrain.rl.training.reference import AdaptersOff, Reference, check_reference
from posttrain.rl.training.starts import TrainerStarts, with_whole_policy
from posttrain.sampling.client import Engines


def run(config: RlConfig, context: StageContext, choose_engines: Callable[..., Choice] | None = None) -> dict[str, Any]:
    """Run the stage; returns its outputs and figures.

    choose_engines: makes a forecast (`forecast.engines.choose_for_run`); without it no number of engines is forecast.
    """
    config = config.model_copy(update={"lora": started_lora(config.model, config.lora, config.images)})
    check_parallel(config.parallel, config.model, config.lora)
    reader = image_reader(config.images, context.dir)
    rows = read_rows(config, context, images=reader)
    heldout = heldout_rows(config, config.evaluation, context, images=reader)
    # A capability or modality that no row has is found before anything starts.
    mixture_shares(rows, config.mixture, "prompt", modalities=config.modalities)
    if (finished := finished_outputs(context.dir, config.steps)) is not None:
        return finished
    from posttrain.model.router_keys import check_router

    check_router(config.model)
    if config.shared_prefixes:
        note_unshared(config.model, context)
    trained, config = config, with_whole_policy(config, context)
    inputs = read_inputs(config, rows, heldout, images=reader)
    note_added_end(inputs.tokenizer, context)
    check_reference(config.loss.reference, config.model)
    prepared = prepare_judge(config.judge) if config.judge is not None else None
    with ExitStack() as models:
        starts = TrainerStarts(trained, context, _folder(inputs.store))
        return _run_with(
            config, context, inputs, models=models, starts=starts, prepared=prepared, choose=choose_engines
        )


def _run_with(
    config: RlConfig,
    context: StageContext,
    inputs: Inputs,
    *,
    models: ExitStack,
    starts: TrainerStarts,
    prepared: PreparedJudge | None,
    choose: Callable[..., Choice] | None,
) -> dict[str, Any]:
    """Start the models, profile and train. models: ends what is started. choose: see `run`."""
    rows, tokenizer, store = inputs.rows, inputs.tokenizer, inputs.store
    models.callback(starts.close)
    if not _share_gpu(config):
        starts.begin()  # beside the engines; on their GPU it would disturb the measurement of free memory
    engines = models.enter_context(Engines(context, config.model, config.engine, resources=config.resources.rollout))
    starts.begin()
    judge = _start_judge(prepared, config.resources.judge, context, models=models)
    reference = _start_reference(config, context.seed, store, models=models)
    stop_ids = tuple(end_token_ids(tokenizer))
    rollouter = partial(_rollouter, config, tokenizer, context.seed)  # each event loop has its own
    profile = _profile(
        config, context, engines, prompts=inputs.prompts, judge=judge, stop_ids=stop_ids, rollouter=rollouter
    )
    selected = select_band(profile, rows, config.profile.band if config.profile is not None else None)
    ledger = open_ledger(context.dir)
    models.callback(ledger.close)
    models.callback(starts.close)  # first of all, as long as the engines stand
    _check_same(ledger, config, rows, context=context)
    measured = [item for item in profile if item.n]
    shares = mixture_shares(selected, config.mixture, modalities=config.modalities)

    def make_parts() -> Parts:
        own = AdaptersOff(starts.trainer) if config.loss.reference is not None else None
        source = prompt_source(config, selected, profile, render=inputs.render, seed=context.seed, store=store)
        archive = RolloutArchive(context.dir / "rollouts", tokenizer)
        return Parts(
            engines, starts.trainer, reference or own, source, shares, archive, ledger,
            stop_ids, inputs.evaluated, judge, measured, len(profile) - len(measured), rollouter(),
            _forecast(config, context, choose),
        )  # fmt: skip

    parts, figures = _train_to_the_end(config, context, starts, make_parts=make_parts, prompts=inputs.prompts)
    outputs = {
        **_selection_figures(config, context, selected, parts=parts, is_profiled=bool(profile)),
        "selected_prompts": len(selected),
        "selected_by_capability": dict(Counter(row.capability for row in selected)),
        **figures,
    }
    ledger.set_fact("outputs", outputs)
    asyncio.run(commit_result(context.dir, ledger))
    return outputs


def _train_to_the_end(
    config: RlConfig,
    context: StageContext,
    starts: TrainerStarts,
    *,
    make_parts: Callable[[], Parts],
    prompts: Sequence[DrawnPrompt],
) -> tuple[Parts, dict[str, Any]]:
    """Train, with a new trainer if one is lost. Returns the parts of the last one, and the figures.

    make_parts: makes the parts around the trainer that `starts` has now.
    """
    is_first = True  # of the trainers: the engines have the weights of the model folder
    while True:
        parts = make_parts()
        try:
            return parts, _train(config, context, parts, prompts=prompts, is_first=is_first)
        except TrainerLostError as error:
            starts.again(error)
        is_first = False


def _selection_figures(
    config: RlConfig, context: StageContext, selected: Sequence[Row], *, parts: Parts, is_profiled: bool
) -> dict[str, Any]:
    """What the profile found; without one, what the first group of each prompt did."""
    if is_profiled:
        return {"profiled_prompts": len(parts.profile), "profile": profile_figures(context.dir)}
    return first_group_figures(config, context.dir, selected, found=parts.source.first_groups())


def _rollouter(config: RlConfig, tokenizer: Tokenizer, seed: int) -> EnvironmentRollouter | None:
    if config.environment is None:
        return None
    return EnvironmentRollouter(config.environment, tokenizer, length=config.engine.length, seed=seed)


def _profile(
    config: RlConfig,
    context: StageContext,
    engines: Engines,
    *,
    prompts: Derived[Row, DrawnPrompt],
    judge: Judge | None,
    stop_ids: tuple[int, ...],
    rollouter: Callable[[], EnvironmentRollouter | None],
) -> list[Difficulty]:
    """How often the policy passes the prompts that `profile` asks for; n is 0 where no reply could be scored."""
    if config.profile is None:
        return []
    asked = prompts.at(profiled_places(prompts.items, config.profile.prompts, context.seed))
    return profile_prompts(
        config, context, engines, prompts=asked, stop_ids=stop_ids, judge=judge, rollouter=rollouter()
    )


def _start_judge(
    prepared: PreparedJudge | None, resources: ActorResources | None, context: StageContext, *, models: ExitStack
) -> Judge | None:
    """Start the judge on engines with `resources`, or connect to its endpoint. None for a stage without a judge."""
    if prepared is None:
        return None
    backend = models.enter_context(open_judge(prepared, context, resources))
    return Judge(prepared, backend)


def _folder(store: ImageStore | None) -> Path | None:
    return None if store is None else store.path.absolute()


def _start_reference(config: RlConfig, seed: int, store: ImageStore | None, *, models: ExitStack) -> Reference | None:
    if config.resources.reference is None:
        return None
    reference = Reference(config, seed, _folder(store))
    models.callback(reference.close)
    return reference


def _forecast(
    config: RlConfig, context: StageContext, choose: Callable[..., Choice] | None
) -> Callable[[int], Choice] | None:
    """How the number of engines is chosen from what the run has shown, if the config says that it is to be forecast."""
    if choose is None or not config.resources.rollout.is_forecast:
        return None

    def forecast(room: int) -> Choice:
        import ray

        most = min(config.resources.rollout.most, room)
        return choose(config, context.dir, most, cpus=ray.cluster_resources().get("CPU", 0.0))

    return forecast


def _share_gpu(config: RlConfig) -> bool:
    """Whether the trainer may be on the GPU of an engine."""
    gpus = config.resources.trainer.gpus, config.resources.rollout.gpus
    return any(number != int(number) for number in gpus)


def _check_same(ledger: Ledger, config: RlConfig, rows: Sequence[Row], *, context: StageContext) -> None:
    """Raise CheckpointError if the run began with another dataset or model or, if it is deterministic, other ranks."""
    now = run_fingerprints(config.model.path, rows, config.parallel if config.deterministic else None)
    if (saved := ledger.fact("fingerprints")) is not None:
        check_resumed(saved, now, context.dir)
    ledger.set_fact("fingerprints", now)
    ledger.set_fact("seed", context.seed)
    ledger.flush_now()


def _train(
    config: RlConfig, context: StageContext, parts: Parts, *, prompts: Sequence[DrawnPrompt], is_first: bool
) -> dict[str, Any]:
    """Train from the last commit to the last step, and write the policy. Returns outputs and figures of the stage.

    is_first: whether the engines have the weights of the model folder.
    """
    first_step, left = resume(config, context, parts)
    is_early = is_first and not first_step and not config.deterministic and config.lora is None
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
            tolerance=allowed_gap(config.parity_tolerance, config.model.dtype),
        )
        context.event("adapters_checked", effect=effect)
    context.phase("sampling while the trainer starts" if is_early else "waiting for the trainer")
    controller = Controller(config, context, parts, first_step=first_step, survivors=left, is_early=is_early)
    try:
        asyncio.run(controller.run())
        controller.finish()
    finally:
        parts.archive.close()  # another trainer may take over, and then the files of steps that are undone are removed
    parts.trainer.save_result(context.dir, config.lora)
    return {
        "model": str(context.dir / MODEL),
        "rollouts": str(context.dir / "rollouts"),
        "steps": config.steps,
        "parity_mean_gap": controller.parity.mean_gap,
        "unscored_replies": unscored_totals(context.dir),
        **parts.trainer.report(),
    }
