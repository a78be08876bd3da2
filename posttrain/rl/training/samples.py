"""Rollouts as training samples, and their micro-batches.

A sample is the very ids that the engine sampled, their log-probabilities and ages, and an advantage. Rows are sorted
by length and right-padded, so that attention is plainly causal and needs no mask; a micro-batch holds at most so many
padded tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from msgspec import Struct

from posttrain.records import Rollout
from posttrain.rl.records import ScoredGroup


class TrainSample(Struct, frozen=True):
    """One reply with its prompt. `advantage` holds for every reply token.

    staleness: of each reply token, the version of the trainer that steps on it minus the version that sampled it.
    ref_logprobs: log-probability of each reply token under the reference policy, at the sampling temperature; empty
    where there is none.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    staleness: tuple[int, ...]
    advantage: float
    ref_logprobs: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


def train_samples(groups: Sequence[ScoredGroup], version: int) -> list[TrainSample]:
    """Every rollout that has an advantage. version: of the trainer, before the step."""
    return [
        TrainSample(
            rollout.prompt_ids,
            rollout.token_ids,
            rollout.sampler_logprobs,
            token_staleness(rollout, version),
            advantage,
            reference,
        )
        for scored in groups
        for rollout, advantage, reference in zip(
            scored.group.rollouts,
            scored.advantages,
            scored.ref_logprobs or ((),) * len(scored.advantages),
            strict=True,
        )
        if advantage is not None
    ]


def token_staleness(rollout: Rollout, version: int) -> tuple[int, ...]:
    """How many versions each reply token is behind `version`."""
    ages = ((version - span.policy_version,) * (span.end - span.start) for span in rollout.versions)
    return tuple(chain.from_iterable(ages))


def micro_batches(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Split into micro-batches of at most `max_tokens` padded tokens (a longer sample stands alone)."""
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
    """Tensors of one micro-batch. B rows, S padded tokens, T reply tokens.

    input_ids_BS: int64. mask_BS: False for padding. position_T: index into the flattened [B * S] hidden states of the
    state that predicts each reply token. target_T, staleness_T: int64. sequence_T: int64, the row of each reply token.
    sampler_logprobs_T, advantages_T: fp32; ref_logprobs_T: fp32, or None where no sample has any.
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
    """Tensors of a micro-batch. The last token of each row is not fed: it predicts nothing.

    Raises ValueError where some reply tokens have a log-probability of the reference and others have none.
    """
    width = max(map(len, samples)) - 1
    lengths = torch.tensor([len(sample) - 1 for sample in samples], device=device)
    rows, positions, targets, logprobs, advantages, staleness, sequences = [], [], [], [], [], [], []
    ref_logprobs = [value for sample in samples for value in sample.ref_logprobs]
    for index, sample in enumerate(samples):
        ids = [*sample.prompt_ids, *sample.token_ids]
        rows.append(ids[:-1] + [pad_id] * (width - len(ids) + 1))
        first = index * width + len(sample.prompt_ids) - 1
        positions += range(first, first + len(sample.token_ids))
        targets += sample.token_ids
        logprobs += sample.sampler_logprobs
        advantages += [sample.advantage] * len(sample.token_ids)
        staleness += sample.staleness
        sequences += [index] * len(sample.token_ids)
    if ref_logprobs and any(len(sample.ref_logprobs) != len(sample.token_ids) for sample in samples):
        raise ValueError("each reply token needs a log-probability of the reference policy, or none may have one")
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
