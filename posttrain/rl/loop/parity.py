"""The check before the first step that engines and trainer compute the same log-probabilities.

If they did not, the importance ratios of every step would be wrong, and training would not show it. The engines first
load the trainer's weights in the same way as in every later update. So the check also finds faults of that update.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Parity:
    """The mean and the largest absolute difference of log-probabilities (in nats) over the sampled tokens."""

    mean_gap: float
    max_gap: float
    num_tokens: int


def allowed_gap(parity_tolerance: float | None, dtype: str) -> float:
    """The largest mean gap that rounding can explain: the one that the config gives, or that of the data type."""
    return parity_tolerance or TOLERANCE[dtype]


def check_engine_parity(
    config: RolloutsConfig,
    context: StageContext,
    engines: Engines,
    *,
    trainer: TrainerClient,
    prompts: Sequence[DrawnPrompt],
    stop_ids: tuple[int, ...],
    manifest: Manifest,
    version: int,
    tolerance: float,
) -> Parity:
    """Compare engines and trainer on a few prompts. Returns the figures of the engine with the largest mean gap.

    All have the weights of `manifest`. Raises StageError if the mean gap of an engine is above `tolerance`. An engine
    that is lost during the check is replaced, and its replacement is compared.
    """
    asked = [(prompt, sample_request(config.sampling, prompt, 1, stop_ids=stop_ids)) for prompt in prompts[:PROMPTS]]
    sampled = asyncio.run(_sample(config, context, engines, asked=asked, manifest=manifest, version=version))
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
    config: RolloutsConfig,
    context: StageContext,
    engines: Engines,
    *,
    asked: Sequence[tuple[DrawnPrompt, SampleRequest]],
    manifest: Manifest,
    version: int,
) -> dict[str, list[Rollout]]:
    """Rollouts by the name of the engine that sampled them. Every engine that is alive at the end has at least one."""
    found: dict[str, list[Rollout]] = {}
    calls = partial(update_calls, config)
    async with SampledGroups(context, engines, config.engine, calls=calls, version=version - 1) as sampled:
        names = await sampled.update(manifest, version)
        while not found.keys() >= set(names):
            # Each flight goes to the worker with the least work, so every worker gets some.
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
