"""What is asked of a rollout engine and what it answers: token ids in, token ids out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from posttrain.records import VersionSpan


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Sample `n` replies to one prompt.

    prompt_ids: token ids, rendered by `posttrain.data.chat`. stop_token_ids: ids that end a reply (kept in it).
    choice_ids: if set, the reply is exactly one of these token ids, and `Completion.choice_logprobs` holds the
    log-probability of each, renormalised over the choices: the distribution of constrained decoding.
    """

    prompt_ids: tuple[int, ...]
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    choice_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled reply. `logprobs` are those of the distribution that the tokens were drawn from."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[VersionSpan, ...]
    choice_logprobs: Mapping[int, float] = field(default_factory=dict)
