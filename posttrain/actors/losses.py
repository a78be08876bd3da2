"""Which errors of a remote call mean that the actor is gone."""

from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from posttrain.errors import StageError

MAX_CONSECUTIVE_LOSSES = 3  # actors lost in a row at one place or at the same work, without a result in between


class ActorLostError(StageError):
    """An actor, or the process that it works with, has died or does not answer: it is of no use any more.

    What was sent to it may be sent to another.
    """


def is_loss(error: BaseException) -> bool:
    """Whether an actor is gone, as opposed to a fault that another actor would have too."""
    gone = RayActorError | ActorUnavailableError | ObjectLostError | ActorLostError | TimeoutError
    return isinstance(root_of(error), gone)


def root_of(error: BaseException) -> BaseException:
    """What was raised, without the wraps of tasks and remote calls."""
    if isinstance(error, BaseExceptionGroup):
        return root_of(error.exceptions[0])
    return error.cause if isinstance(error, RayTaskError) else error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
