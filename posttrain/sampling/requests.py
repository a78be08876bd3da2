"""The requests to an engine and its answers, both as token ids."""

from collections.abc import Mapping

from msgspec import Struct, field

from posttrain.actors.losses import ActorLostError
from posttrain.records import FinishReason, VersionSpan


class EngineLostError(ActorLostError):
    """The engine's core process has died or does not answer, and the actor is of no use any more.

    The message names the engine and its policy version, and says how the loss was found.
    """


class SampleRequest(Struct, frozen=True):
    """A request for `n` replies to one prompt. Example: `SampleRequest((5, 6, 7), n=8, max_tokens=512)`.

    prompt_ids: token ids, rendered by `posttrain.data.chat`. stop_token_ids: the ids that end a reply, and are part
    of it; no other token does.
    choice_ids: if set, the reply is exactly one of these token ids, and `Completion.choice_logprobs` holds the
    log-probability of each, renormalised over the choices: the distribution of constrained decoding. `max_tokens` must
    be 1 then. begun: token ids of replies that another engine began, one entry for each reply wanted (`n` is then
    ignored). Each is continued, and `max_tokens` counts its tokens too. Only `EngineActor.submit` takes them.
    stop: texts at which a reply ends too; the text is part of the reply.
    priority: requests with a larger number start later, and are interrupted first when memory is short. That of a first
    turn is even; later turns of the same rollout have one less.
    seed: if set, each token is drawn by it and the token's place alone. So the reply is the same whatever else is
    sampled, and wherever it is cut off and continued. `n` is 1 then.
    since: the policy version at which its rollout was begun. An engine that keeps caches over updates lets it read what
    was computed since. None: only what the present weights have computed.
    pictures: references to the pictures that the prompt shows, in order (`Media.uri`); `prompt_ids` holds all their
    tokens.
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
    stop: tuple[str, ...] = ()
    seed: int | None = None
    since: int | None = None
    pictures: tuple[str, ...] = ()


class Completion(Struct, frozen=True):
    """One sampled reply. `logprobs` are those of the distribution that the tokens were drawn from.

    choice_logprobs: by token id, for a request with `choice_ids` only.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    choice_logprobs: Mapping[int, float] = field(default_factory=dict)


class Updated(Struct, frozen=True):
    """New weights were taken. began, ended: Unix times of the pause. step_sums: of the steps since the update before,
    as `StepSums` has them.
    """

    began: float
    ended: float
    step_sums: list[float]


class Piece(Struct, frozen=True):
    """The next tokens of reply `index` of the request that was submitted as `key`.

    start: place of the first token in the whole reply, counting tokens that another engine began. versions: spans that
    cover this piece exactly, in places of the whole reply. finish_reason: RUNNING while the reply goes on. text: that
    of the whole reply; set only in the last piece. choice_logprobs: see `Completion`; in the piece with the token.
    num_cached: how many tokens of the prompt the engine had in its cache; set only in the last piece.
    """

    key: int
    index: int
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason = FinishReason.RUNNING
    text: str = ""
    choice_logprobs: Mapping[int, float] = field(default_factory=dict)
    num_cached: int = 0


NOTHING = Completion((), "", (), FinishReason.RUNNING, ())
