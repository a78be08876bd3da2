"""Rollouts as training samples, and their micro-batches.

A sample holds the token ids that the engine sampled, with their log-probabilities and staleness, the ids around them,
and an advantage. Samples are sorted by length and padded on the right, so that causal attention needs no mask. A
micro-batch holds a limited number of padded tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from msgspec import Struct

from posttrain.records import Rollout
from posttrain.rl.records import ScoredGroup


class TrainSample(Struct, frozen=True):
    """One rollout as the trainer gets it: all its tokens, and which of them are trained on.

    token_ids: of the prompt and of all segments. trained: (start, end) places in `token_ids` of the tokens that are
    trained on, in order, none at place 0. The other sequences have one entry for each trained token, in order:
    sampler_logprobs; staleness: the version of the trainer that steps on it minus the version that sampled the token;
    ref_logprobs: log-probability under the reference policy at the sampling temperature, empty without a reference.
    advantage: of every trained token.

    Example: a prompt of three tokens and a reply of two: `TrainSample((1, 2, 3, 7, 8), ((3, 5),), (-0.1, -0.2),
    (0, 0), 0.5)`. With a tool's result of one token in between: `TrainSample((1, 2, 3, 7, 8, 4, 9), ((3, 5), (6, 7)),
    (-0.1, -0.2, -0.3), (0, 0, 0), 0.5)`.
    """

    token_ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    sampler_logprobs: tuple[float, ...]
    staleness: tuple[int, ...]
    advantage: float
    ref_logprobs: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.sampler_logprobs)


def train_samples(groups: Sequence[ScoredGroup], version: int) -> list[TrainSample]:
    """The samples of rollouts that have an advantage and trained tokens. version: the trainer's, before the step."""
    return [
        train_sample(rollout, version, advantage or 0.0, ref_logprobs=reference)
        for scored in groups
        for rollout, advantage, reference in zip(
            scored.group.rollouts,
            scored.advantages,
            scored.ref_logprobs or ((),) * len(scored.advantages),
            strict=True,
        )
        if is_trained_on(rollout, advantage)
    ]


def is_trained_on(rollout: Rollout, advantage: float | None) -> bool:
    """True if a rollout is part of a batch, because it has an advantage and trained tokens."""
    return advantage is not None and any(segment.trained for segment in rollout.segments)


def train_sample(
    rollout: Rollout, version: int, advantage: float, *, ref_logprobs: tuple[float, ...] = ()
) -> TrainSample:
    """The sample of one rollout. Raises ValueError if a segment that is trained on was not sampled."""
    first = len(rollout.prompt_ids)
    spans, logprobs, ages = [], [], []
    for start, segment in rollout.trained_segments:
        if segment.sampler_logprobs is None:
            raise ValueError(
                f"rollout {rollout.group_id}/{rollout.index}: a segment is marked as trained on, but was not sampled"
            )
        spans.append((first + start, first + start + len(segment.token_ids)))
        logprobs.append(segment.sampler_logprobs)
        ages += [(version - span.policy_version,) * (span.end - span.start) for span in segment.versions]
    return TrainSample(
        rollout.prompt_ids + rollout.token_ids,
        tuple(spans),
        tuple(chain.from_iterable(logprobs)),
        tuple(chain.from_iterable(ages)),
        advantage,
        ref_logprobs,
    )


def micro_batches(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Split into micro-batches of at most `max_tokens` padded tokens. A longer sample is a micro-batch of its own."""
    batches: list[list[TrainSample]] = []
    current: list[TrainSample] = []
    for sample in sorted(samples, key=len):
        if current and len(sample) * (len(current) + 1) > max_tokens:
            batches.append(current)
            current = []
        current.append(sample)
    return [*batches, current] if current else batches


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one micro-batch. B rows, S padded tokens, T trained tokens.

    input_ids_BS: int64. mask_BS: False for padding. position_T: index into the flattened [B * S] hidden states of the
    state that predicts each trained token. target_T, staleness_T: int64. sequence_T: int64, the row of each trained
    token. sampler_logprobs_T, advantages_T: fp32. ref_logprobs_T: fp32, or None if no sample has any.
    """

    input_ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    position_T: torch.Tensor
    target_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    staleness_T: torch.Tensor
    sequence_T: torch.Tensor
    ref_logprobs_T: torch.Tensor | None


def collate(samples: Sequence[TrainSample], pad_id: int, device: torch.device | str = "cpu") -> MicroBatch:
    """The tensors of a micro-batch. The last token of each row is left out of the input, as it predicts no token.

    Raises ValueError if some samples have log-probabilities of the reference and others do not, or if the lengths of a
    sample's sequences do not fit its trained tokens.
    """
    width = max(map(len, samples)) - 1
    lengths = torch.tensor([len(sample) - 1 for sample in samples], device=device)
    rows, positions, targets, logprobs, advantages, staleness, sequences = [], [], [], [], [], [], []
    ref_logprobs = [value for sample in samples for value in sample.ref_logprobs]
    for index, sample in enumerate(samples):
        _check_lengths(sample, bool(ref_logprobs))
        rows.append(list(sample.token_ids[:-1]) + [pad_id] * (width - len(sample) + 1))
        for start, end in sample.trained:
            # The hidden state at a token predicts the next one, so each target has the place before its own.
            positions += range(index * width + start - 1, index * width + end - 1)
            targets += sample.token_ids[start:end]
        logprobs += sample.sampler_logprobs
        advantages += [sample.advantage] * sample.num_trained
        staleness += sample.staleness
        sequences += [index] * sample.num_trained
    return MicroBatch(
        torch.tensor(rows, device=device),
        torch.arange(width, device=device) < lengths[:, None],
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(logprobs, dtype=torch.float32, device=device),
        torch.tensor(advantages, dtype=torch.float32, device=device),
        torch.tensor(staleness, device=device),
        torch.tensor(sequences, device=device),
        torch.tensor(ref_logprobs, dtype=torch.float32, device=device) if ref_logprobs else None,
    )


def _check_lengths(sample: TrainSample, has_reference: bool) -> None:
    count = sum(end - start for start, end in sample.trained)
    if not len(sample.sampler_logprobs) == len(sample.staleness) == count:
        raise ValueError(
            f"{count} tokens are trained on, but there are {len(sample.sampler_logprobs)} log-probabilities of the "
            f"sampler and {len(sample.staleness)} values of staleness"
        )
    if has_reference and len(sample.ref_logprobs) != count:
        raise ValueError("each trained token needs a log-probability of the reference policy, or none may have one")
