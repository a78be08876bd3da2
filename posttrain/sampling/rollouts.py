"""Makes rollouts of the replies that an engine sampled. No other code makes rollouts."""

from msgspec import Struct

from posttrain.records import FinishReason, Prompt, Rollout, Scored, Segment, num_sampled
from posttrain.sampling.requests import Completion


class Reply(Struct, frozen=True, array_like=True):
    """A rollout without its prompt, finished or not (FinishReason.RUNNING). The ledger keeps these."""

    segments: tuple[Segment, ...]
    text: str
    finish_reason: FinishReason
    scored: Scored | None = None

    @property
    def num_sampled(self) -> int:
        """How many tokens the policy sampled."""
        return num_sampled(self.segments)


UNBEGUN = Reply((), "", FinishReason.RUNNING)


def segment_of(completion: Completion) -> Segment:
    """One turn of the policy as a segment: sampled, and trained on."""
    return Segment(completion.token_ids, True, completion.logprobs, completion.versions)


def whole_reply(completion: Completion) -> Reply:
    """The reply that consists of one finished turn."""
    return Reply((segment_of(completion),), completion.text, completion.finish_reason)


def reply_of(rollout: Rollout) -> Reply:
    """A finished rollout without its prompt."""
    return Reply(rollout.segments, rollout.text, rollout.finish_reason, rollout.scored)


def up_to(reply: Reply, version: int) -> Reply:
    """The reply without any token that a version later than `version` sampled, and without all that follows such a
    token.

    A reply from which nothing is removed stays finished; any other is unfinished and can be continued from there.
    """
    kept: list[Segment] = []
    for segment in reply.segments:
        end = next((span.start for span in segment.versions if span.policy_version > version), None)
        if end is None:
            kept.append(segment)
            continue
        if end and segment.sampler_logprobs is not None:
            spans = tuple(span for span in segment.versions if span.end <= end)
            kept.append(Segment(segment.token_ids[:end], segment.trained, segment.sampler_logprobs[:end], spans))
        return Reply(tuple(kept), "", FinishReason.RUNNING)
    return reply


def make_rollout(
    prompt: Prompt,
    reply: Reply,
    *,
    prompt_id: str,
    group_id: str,
    index: int,
    system: str | None = None,
    worker: str = "",
    started_s: float = 0.0,
    finished_s: float = 0.0,
) -> Rollout:
    """Make the rollout of a finished reply. For the arguments see `Rollout`."""
    return Rollout(
        prompt_id,
        group_id,
        index,
        prompt,
        reply.segments,
        reply.text,
        reply.finish_reason,
        system,
        worker,
        started_s,
        finished_s,
        reply.scored,
    )
