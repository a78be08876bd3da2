"""Records of rollouts of one turn, and of prompts, in few words."""

from collections.abc import Sequence

from posttrain.records import DrawnPrompt, FinishReason, Message, Prompt, Rollout, Row, Segment, VersionSpan
from posttrain.rl.training.samples import TrainSample


def one_turn(
    prompt_id: str,
    group_id: str,
    index: int,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    text: str,
    logprobs: Sequence[float],
    versions: Sequence[VersionSpan],
    finish_reason: str,
    system: str | None = None,
) -> Rollout:
    """A rollout of one segment, sampled and trained on."""
    segment = Segment(tuple(token_ids), True, tuple(logprobs), tuple(versions))
    prompt = Prompt((), tuple(prompt_ids))
    return Rollout(prompt_id, group_id, index, prompt, (segment,), text, FinishReason(finish_reason), system)


def reply_sample(
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    staleness: Sequence[int],
    advantage: float,
    ref_logprobs: Sequence[float] = (),
) -> TrainSample:
    """A prompt and a reply, all of which is trained on."""
    first, ids = len(prompt_ids), (*prompt_ids, *token_ids)
    return TrainSample(ids, ((first, len(ids)),), tuple(logprobs), tuple(staleness), advantage, tuple(ref_logprobs))


def drawn(row: Row, messages: tuple[Message, ...], prompt_ids: Sequence[int]) -> DrawnPrompt:
    """A prompt without a sampled system instruction."""
    return DrawnPrompt(row, None, Prompt(messages, tuple(prompt_ids)))
