"""Which errors of a remote call mean that the engine is gone."""

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from posttrain.sampling.requests import EngineLostError


def is_loss(error: BaseException) -> bool:
    """Whether an engine is gone, as opposed to a fault that another engine would have too."""
    return isinstance(root_of(error), RayActorError | ActorUnavailableError | EngineLostError | TimeoutError)


def root_of(error: BaseException) -> BaseException:
    """What was raised, without the wraps of tasks and remote calls."""
    if isinstance(error, BaseExceptionGroup):
        return root_of(error.exceptions[0])
    return error.cause if isinstance(error, RayTaskError) else error
