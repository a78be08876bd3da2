"""The check before the first step that engines are sent the weights with the adapters of `lora` added.

New adapters change no log-probability. So the check of parity could not notice an engine that samples without them, and
every later step would be silently wrong. Here the trainer gives the adapters values that matter, sends the weights as
in every update, compares what the engines sample, and takes the values back.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.records import DrawnPrompt, Rollout
from posttrain.rl.rollouts.config import RolloutsConfig
from posttrain.rl.rollouts.requests import sample_request
from posttrain.rl.rollouts.weights import update_calls
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.samples import train_sample
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.rollouter import Flight, SingleTurn

PROMPTS = 16
LOOKED_AT = 256
# What adapters add to a weight, as a multiple of the weight's norm: enlarged until log-probabilities change by this
# many times the tolerance.
SIZES = (0.1, 0.4, 1.6, 6.4)
SEEN = 4
# An engine without the adapters differs by the whole change. Rounding may grow with the change, but not to this share.
ROUNDED = 1 / 16


def check_adapters(
    config: RolloutsConfig,
    context: StageContext,
    engines: Engines,
    *,
    trainer: TrainerClient,
    prompts: Sequence[DrawnPrompt],
    stop_ids: tuple[int, ...],
    version: int,
    tolerance: float,
) -> float:
    """Raise StageError if an engine samples from other weights than those of the trainer with its adapters.

    version: that of the trainer's policy, which engines and trainer have again afterwards. tolerance: the largest mean
    difference of log-probabilities that rounding explains, in nats. Returns the mean change by the adapters with which
    the engines were compared.
    """
    # An engine must not read with one policy what it cached with another.
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"kv": "recompute"})})
    asked = [
        (prompt, sample_request(config.sampling, prompt, 1, stop_ids=stop_ids)) for prompt in chosen_prompts(prompts)
    ]
    session = partial(SampledGroups, context, engines, config.engine, calls=partial(update_calls, config))
    effect = 0.0
    try:
        for size in SIZES:
            sampled = asyncio.run(_sampled(session, asked, trainer.probe(size), version=version))
            gap, effect = _compared(trainer, sampled, version)
            if effect < SEEN * tolerance:
                continue
            if not gap <= max(tolerance, ROUNDED * effect):
                raise StageError(
                    "engines do not sample from the weights with the adapters of `lora`: their log-probabilities are "
                    f"{gap:.2g} from the trainer's on average, and its adapters make a difference of {effect:.2g}; "
                    "training on them would be silently wrong"
                )
            return effect
    finally:
        asyncio.run(_sampled(session, (), trainer.probe(0.0), version=version))
    raise StageError(
        f"the adapters of `lora` change log-probabilities by no more than {effect:.2g}, whatever their values, so it "
        f"cannot be seen whether engines are sent them (parity_tolerance is {tolerance:g}); choose other "
        "lora.target_modules"
    )


def chosen_prompts(prompts: Sequence[DrawnPrompt]) -> list[DrawnPrompt]:
    """The first prompts, half of them with pictures if there are any: adapters of a vision encoder change no others."""
    looked = list(prompts[:LOOKED_AT])
    shown = [prompt for prompt in looked if prompt.prompt.media][: PROMPTS // 2]
    return [*shown, *(prompt for prompt in looked if prompt not in shown)][:PROMPTS]


def _compared(trainer: TrainerClient, sampled: dict[str, list[Rollout]], version: int) -> tuple[float, float]:
    """(largest mean gap of an engine from the trainer, mean change by the adapters)."""
    gaps, changes = [], []
    for rollouts in sampled.values():
        samples = [train_sample(rollout, version, 0.0) for rollout in rollouts]
        ours = trainer.logprobs(samples)
        gaps.append(_mean_gap(ours, [sample.sampler_logprobs for sample in samples]))
        changes.append(_mean_gap(ours, trainer.logprobs(samples, False)))
    return max(gaps), min(changes)


def _mean_gap(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    gaps = [abs(one - other) for row, others in pairs for one, other in zip(row, others, strict=True)]
    return sum(gaps) / len(gaps)


async def _sampled(session: Any, asked: Sequence[Any], manifest: Manifest, *, version: int) -> dict[str, list[Rollout]]:
    """Have all engines load the weights. Returns rollouts by the name of the engine, at least one of each.

    asked: (prompt, request) of what is sampled; if it is empty, nothing is. session: makes a `SampledGroups`.
    """
    found: dict[str, list[Rollout]] = {}
    async with session(version=version - 1) as engines:
        names = await engines.update(manifest, version)
        while asked and not found.keys() >= set(names):
            # Each flight goes to the worker with the least work, so every worker gets some.
            flights = [
                Flight(order, version, prompt, request=request, rollouter=SingleTurn())
                for order, (prompt, request) in enumerate(list(asked) * len(names))
            ]
            await engines.groups(flights)
            for flight in flights:
                (rollout,) = flight.rollouts
                found.setdefault(rollout.worker, []).append(rollout)
            names = await engines.update(manifest, version)
    return {name: found[name] for name in names if name in found}
