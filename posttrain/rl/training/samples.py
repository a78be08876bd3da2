"""Rollouts as training samples.

A sample is one branch of a rollout, which is all of it unless its chat template rewrote earlier turns. A token that was
sampled is trained on in the one branch in which it was sampled. A sample holds the token ids that the engine sampled,
with their log-probabilities and staleness, the ids around them, and an advantage.
"""

import math
from collections.abc import Sequence
from itertools import chain

from msgspec import Struct
from msgspec.structs import replace

from posttrain.records import Branch, Rollout
from posttrain.rl.records import ScoredGroup


class TrainSample(Struct, frozen=True):
    """One branch of a rollout as the trainer gets it: all its tokens, and which of them are trained on.

    token_ids: of the prompt and of all after it. trained: (start, end) places in `token_ids` of the tokens that are
    trained on, in order, none at place 0. The other sequences have one entry for each trained token, in order:
    sampler_logprobs; staleness: the version of the trainer that steps on it minus the version that sampled the token;
    ref_logprobs: log-probability under the reference policy at the sampling temperature, empty without a reference.
    advantage: of every trained token; or, if `turn_advantages` is not empty, that has one for each entry of `trained`.
    pictures: keys of the pictures that the prompt shows, in order.

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
    turn_advantages: tuple[float, ...] = ()
    pictures: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.sampler_logprobs)

    @property
    def spans(self) -> list[tuple[int, float]]:
        """The number of tokens and the advantage of each entry of `trained`."""
        lengths = [end - start for start, end in self.trained]
        return list(zip(lengths, self.turn_advantages or (self.advantage,) * len(lengths), strict=True))


def train_samples(groups: Sequence[ScoredGroup], version: int) -> list[TrainSample]:
    """The samples of rollouts that have an advantage and trained tokens. version: the trainer's, before the step."""
    return [
        sample
        for scored in groups
        for rollout, advantage, turns, reference in zip(
            scored.group.rollouts,
            scored.advantages,
            scored.turn_advantages or ((),) * len(scored.advantages),
            scored.ref_logprobs or ((),) * len(scored.advantages),
            strict=True,
        )
        if is_trained_on(rollout, advantage)
        for sample in rollout_samples(rollout, version, advantage or 0.0, turn_advantages=turns, ref_logprobs=reference)
    ]


def is_trained_on(rollout: Rollout, advantage: float | None) -> bool:
    """True if a rollout is part of a batch, because it has an advantage and trained tokens."""
    return advantage is not None and any(segment.trained for segment in rollout.segments)


def num_trained(rollout: Rollout) -> int:
    """How many tokens of the rollout are trained on."""
    return sum(len(segment.token_ids) for segment in rollout.segments if segment.trained)


def rollout_samples(
    rollout: Rollout,
    version: int,
    advantage: float,
    *,
    turn_advantages: Sequence[float] = (),
    ref_logprobs: tuple[float, ...] = (),
) -> list[TrainSample]:
    """The samples of one rollout, one for each branch with trained tokens. Raises ValueError if a segment that is
    trained on was not sampled.

    version: the trainer's, before the step. turn_advantages: of each turn of the policy, trained on or not; () if all
    have the rollout's. ref_logprobs: of the trained tokens of all branches, in order.
    """
    samples: list[TrainSample] = []
    first = 0
    turns = iter(turn_advantages)
    for branch in rollout.branches:
        sample = _branch_sample(rollout, branch, version, advantage=advantage)
        if sample.trained and not (ref_logprobs or turn_advantages):  # most samples; their copies would take long
            samples.append(sample)
            continue
        sampled = [segment for _, segment in branch.segments if segment.sampler_logprobs is not None]
        own = tuple(value for segment, value in zip(sampled, turns, strict=False) if segment.trained)
        if sample.trained:
            last = first + sample.num_trained
            samples.append(replace(sample, ref_logprobs=ref_logprobs[first:last], turn_advantages=own))
            first = last
    return samples


def train_sample(rollout: Rollout, version: int, advantage: float) -> TrainSample:
    """The sample of a rollout that has one branch. Raises ValueError for a rollout of more."""
    (sample,) = rollout_samples(rollout, version, advantage)
    return sample


def _branch_sample(rollout: Rollout, branch: Branch, version: int, *, advantage: float) -> TrainSample:
    spans, logprobs, ages = [], [], []
    for start, segment in branch.segments:
        if not segment.trained:
            continue
        if segment.sampler_logprobs is None:
            raise ValueError(
                f"rollout {rollout.group_id}/{rollout.index}: a segment is marked as trained on, but was not sampled"
            )
        spans.append((start, start + len(segment.token_ids)))
        logprobs.append(segment.sampler_logprobs)
        ages += [(version - span.policy_version,) * (span.end - span.start) for span in segment.versions]
    return TrainSample(
        branch.token_ids,
        tuple(spans),
        tuple(chain.from_iterable(logprobs)),
        tuple(chain.from_iterable(ages)),
        advantage,
        pictures=tuple(item.key for item in rollout.prompt.media),
    )


def token_advantage_std(samples: Sequence[TrainSample]) -> float:
    """The standard deviation of the advantage over trained tokens."""
    spans = [span for sample in samples for span in sample.spans]
    num_tokens = sum(count for count, _ in spans)
    mean = sum(count * advantage for count, advantage in spans) / num_tokens
    return math.sqrt(sum(count * (advantage - mean) ** 2 for count, advantage in spans) / num_tokens)
