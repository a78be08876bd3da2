"""The start-up gate: the engines' log-probabilities must be the trainer's, or RL would train on a lie.

The engines first take the trainer's own version-0 weights over the same road that every later update takes, so a fault
of reloading shows here too, before a step is trained.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.records import DrawnPrompt, Rollout
from posttrain.rl.config import RlConfig
from posttrain.rl.rollouts.requests import sample_request
from posttrain.rl.rollouts.weights import update_calls
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.samples import train_sample
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Parity:
    """Mean and largest absolute gap of log-probabilities over the sampled tokens."""

    mean_gap: float
    max_gap: float
    num_tokens: int


def allowed_gap(config: RlConfig) -> float:
    """Largest mean gap that is rounding."""
    return config.parity_tolerance or TOLERANCE[config.model.dtype]


def check_engine_parity(
    config: RlConfig,
    context: StageContext,
    engines: Engines,
    *,
    trainer: TrainerClient,
    prompts: Sequence[DrawnPrompt],
    stop_ids: tuple[int, ...],
    manifest: Manifest,
    version: int,
) -> Parity:
    """Compare on a few prompts, with the weights of `manifest`; raises `StageError` where the mean gap is too large.

    An engine that is lost meanwhile is replaced, and its replacement is compared.
    """
    asked = [(prompt, sample_request(config.sampling, prompt, 1, stop_ids=stop_ids)) for prompt in prompts[:PROMPTS]]
    sampled = asyncio.run(_sample(config, context, engines, asked=asked, manifest=manifest, version=version))
    tolerance = allowed_gap(config)
    worst = Parity(0.0, 0.0, 0)
    for name, rollouts in sampled.items():
        samples = [train_sample(rollout, version, 0.0) for rollout in rollouts]
        policy = trainer.logprobs(samples)
        gaps = [
            abs(ours - theirs)
            for sample, values in zip(samples, policy, strict=True)
            for ours, theirs in zip(values, sample.sampler_logprobs, strict=True)
        ]
        parity = Parity(sum(gaps) / len(gaps), max(gaps), len(gaps))
        if not parity.mean_gap <= tolerance:
            raise StageError(
                f"{name} and the trainer disagree on the log-probabilities of {parity.num_tokens} sampled tokens: mean "
                f"gap {parity.mean_gap:.2g}, largest {parity.max_gap:.2g}, allowed mean {tolerance:g} "
                "(parity_tolerance); training on them would be silently wrong"
            )
        worst = max(worst, parity, key=lambda item: item.mean_gap)
    return worst


async def _sample(
    config: RlConfig,
    context: StageContext,
    engines: Engines,
    *,
    asked: Sequence[tuple[DrawnPrompt, SampleRequest]],
    manifest: Manifest,
    version: int,
) -> dict[str, list[Rollout]]:
    """Rollouts by the name of the engine that sampled them: at least one of each that is there in the end."""
    found: dict[str, list[Rollout]] = {}
    calls = partial(update_calls, config)
    async with SampledGroups(context, engines, config.engine, calls=calls, version=version - 1) as sampled:
        names = await sampled.update(manifest, version)
        while not found.keys() >= set(names):
            # The worker with the least to do is asked, so each gets its share.
            flights = [
                Flight(order, version, prompt, request=request)
                for order, (prompt, request) in enumerate(list(asked) * len(names))
            ]
            await sampled.groups(flights)
            for flight in flights:
                (rollout,) = flight.rollouts
                found.setdefault(rollout.worker, []).append(rollout)
            names = await sampled.update(manifest, version)
    return {name: found[name] for name in names}
