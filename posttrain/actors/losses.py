"""Which errors of a remote call mean that the actor is gone."""

from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from posttrain.errors import StageError

MAX_CONSECUTIVE_LOSSES = (
    3  # so many actors may be lost in a row, in one place or with the same work, without a result in between
)


class ActorLostError(StageError):
    """An actor, or the process that it works with, has died or does not answer, and is of no use any more.

    The work that was sent to it may be sent to another actor.
    """


def is_loss(error: BaseException) -> bool:
    """True if the error means that the actor is gone, and not that the work itself is at fault."""
    gone = RayActorError | ActorUnavailableError | ObjectLostError | ActorLostError | TimeoutError
    return isinstance(root_of(error), gone)


def root_of(error: BaseException) -> BaseException:
    """The error that was raised first, without what tasks and remote calls wrap around it."""
    if isinstance(error, BaseExceptionGroup):
        return root_of(error.exceptions[0])
    return error.cause if isinstance(error, RayTaskError) else error


def reason_of(error: BaseException) -> str:
    """The message of the error that was raised first, on one line, cut to a moderate length."""
    root = root_of(error)
    return " ".join(str(root).split())[:300] or type(root).__name__
