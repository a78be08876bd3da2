"""The update of all engines with new weights: the backend, the order of the engines, and the arguments of each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.rl.rollouts.config import RolloutsConfig
from posttrain.sampling.manifests import Manifest, source_for

if TYPE_CHECKING:
    from posttrain.sampling.transfer import Publisher


def publisher(config: RolloutsConfig) -> "Publisher":
    """The object with which the trainer publishes weights through the backend of the config."""
    from posttrain.sampling.transfer import make_publisher  # imports torch, which the controller does without

    engines = config.resources.rollout.most
    return make_publisher(
        config.weights.backend,
        engines,
        config.engine.tensor_parallel,
        deadline_s=config.engine.deadline_s,
        delta=config.weights.delta,
    )


def update_calls(
    config: RolloutsConfig, manifest: Manifest, policy_version: int, *, seats: Sequence[int]
) -> list[list[tuple[int, dict[str, Any]]]]:
    """The calls of `EngineActor.update_weights`: (seat of the engine, arguments) for each of these seats.

    The engines of one inner list take the weights at the same time. The next list follows once all of them are done.
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
        for engine in seats
    ]
    return [calls] if config.weights.order == "together" else [[call] for call in calls]
