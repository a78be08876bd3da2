"""The start-up gate: the engines' log-probabilities must be the trainer's, or RL would train on a lie.

The engines first take the trainer's own version-0 weights over the same road that every later update takes, so a fault
of reloading shows here too, before a step is trained.
"""

from dataclasses import dataclass

from posttrain.errors import StageError
from posttrain.rl.config import RlConfig
from posttrain.rl.records import DrawnPrompt, make_group
from posttrain.rl.rollouts.requests import sample_request
from posttrain.rl.rollouts.weights import update_calls
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.samples import train_sample
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.rollouts import whole_reply

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
    engines: Engines,
    trainer: TrainerClient,
    prompts: list[DrawnPrompt],
    stop_ids: tuple[int, ...],
    manifest: Manifest,
    version: int,
) -> Parity:
    """Compare on a few prompts, with the weights of `manifest`; raises `StageError` where the mean gap is too large."""
    import ray

    for calls in update_calls(config, manifest, version):
        ray.get([engines.actors[engine].update_weights.remote(**arguments) for engine, arguments in calls])
    tolerance = allowed_gap(config)
    worst = Parity(0.0, 0.0, 0)
    for name, actor in zip(engines.names, engines.actors, strict=True):
        requests = [sample_request(config.sampling, prompt, 1, stop_ids=stop_ids) for prompt in prompts[:PROMPTS]]
        completions, _, _ = ray.get(actor.generate.remote(requests))
        groups = [
            make_group(index, prompt, [whole_reply(replies[0])])
            for index, (prompt, replies) in enumerate(zip(prompts[:PROMPTS], completions, strict=True))
        ]
        samples = [train_sample(rollout, version, 0.0) for group in groups for rollout in group.rollouts]
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
