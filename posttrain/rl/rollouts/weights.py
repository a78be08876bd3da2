"""New weights on their way to all engines: by which backend, which engines at the same time, with which arguments."""

from typing import Any

from posttrain.rl.rollouts.config import RolloutsConfig
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.transfer import Publisher, make_publisher, source_for


def publisher(config: RolloutsConfig) -> Publisher:
    """The trainer's end of the backend."""
    engines = config.resources.rollout.workers
    return make_publisher(
        config.weights.backend, engines, config.engine.tensor_parallel, deadline_s=config.engine.deadline_s
    )


def update_calls(
    config: RolloutsConfig, manifest: Manifest, policy_version: int
) -> list[list[tuple[int, dict[str, Any]]]]:
    """What `EngineActor.update_weights` is called with: (number of the engine, arguments) for each.

    Those of one inner list take the weights at the same time; the next list follows when all of them have.
    """
    calls = [
        (
            engine,
            {
                "source": source_for(manifest, engine, config.engine.tensor_parallel),
                "policy_version": policy_version,
                "kv": config.weights.kv,
            },
        )
        for engine in range(config.resources.rollout.workers)
    ]
    return [calls] if config.weights.order == "together" else [[call] for call in calls]
