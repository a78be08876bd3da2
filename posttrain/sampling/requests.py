"""What is asked of a rollout engine and what it answers: token ids in, token ids out."""

from collections.abc import Mapping

from msgspec import Struct, field

from posttrain.actors.losses import ActorLostError
from posttrain.records import FinishReason, VersionSpan


class EngineLostError(ActorLostError):
    """The engine's core process has died or does not answer; the actor is of no use any more. The message says which
    engine, which policy version, and how it was found."""


class SampleRequest(Struct, frozen=True):
    """Sample `n` replies to one prompt.

    prompt_ids: token ids, rendered by `posttrain.data.chat`. stop_token_ids: ids that end a reply (kept in it).
    choice_ids: if set, the reply is exactly one of these token ids, and `Completion.choice_logprobs` holds the
    log-probability of each, renormalised over the choices: the distribution of constrained decoding.
    begun: token ids of replies that were begun elsewhere, one entry for each reply that is wanted (`n` is ignored
    then): each is continued, and `max_tokens` counts what is there. Only `EngineActor.submit` takes them.
    priority: replies of a larger one start later, and are interrupted first where memory is short.
    """

    prompt_ids: tuple[int, ...]
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    choice_ids: tuple[int, ...] | None = None
    begun: tuple[tuple[int, ...], ...] = ()
    priority: int = 0


class Completion(Struct, frozen=True):
    """One sampled reply. `logprobs` are those of the distribution that the tokens were drawn from."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    choice_logprobs: Mapping[int, float] = field(default_factory=dict)


class Piece(Struct, frozen=True):
    """The next tokens of reply `index` of the request that was submitted as `key`.

    start: place of the first token in the whole reply; tokens that were begun elsewhere count. versions: cover this
    piece exactly, in places of the whole reply. finish_reason: RUNNING while the reply goes on. text: of the whole
    reply, with what was begun elsewhere; in the last piece only.
    """

    key: int
    index: int
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason = FinishReason.RUNNING
    text: str = ""


NOTHING = Completion((), "", (), FinishReason.RUNNING, ())
