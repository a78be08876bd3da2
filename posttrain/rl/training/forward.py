"""One forward of the trainer: a micro-batch's share of the loss of its step, and which micro-batches a rank runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.model.vision.tiling import PictureTiles
from posttrain.rl.loss_config import LossConfig
from posttrain.rl.losses import LOSSES, LossInputs, LossOutputs
from posttrain.rl.objective import batch_share
from posttrain.rl.training.batches import MicroBatch, collate, micro_batches
from posttrain.rl.training.policy import PAD_ID
from posttrain.rl.training.samples import TrainSample


@dataclass(frozen=True, slots=True)
class ForwardShare:
    """One forward's share of the loss of its step, and the tensors from which it was computed."""

    loss: torch.Tensor
    inputs: LossInputs
    outputs: LossOutputs
    entropy_T: torch.Tensor


def forward_share(
    policy: Any,
    chunk: Sequence[TrainSample],
    samples: Sequence[TrainSample],
    *,
    config: LossConfig,
    max_tokens: int,
    device: str,
) -> ForwardShare:
    """Run one micro-batch, `chunk`, of the step's `samples`. The shares of all micro-batches add up to the step's loss.

    policy: a `TokenPolicy`, or an engine around one. max_tokens: the longest reply that could be sampled.
    """
    batch = collate(chunk, PAD_ID, device, shared=policy.shares_prefixes, tiles=policy.tiles)
    policy_T, entropy_T, router_loss = policy(batch)
    inputs = loss_inputs(policy_T, batch, max_tokens)
    outputs = LOSSES[config.name](inputs, config)
    num_tokens = sum(sample.num_trained for sample in samples)
    loss = batch_share(outputs, inputs, entropy_T, num_tokens=num_tokens, num_sequences=len(samples), config=config)
    fed = sum(len(sample) - 1 for sample in chunk) / sum(len(sample) - 1 for sample in samples)
    return ForwardShare(loss + fed * router_loss, inputs, outputs, entropy_T)


def loss_inputs(policy_logprobs_T: torch.Tensor, batch: MicroBatch, max_tokens: int) -> LossInputs:
    """The inputs of a loss: a micro-batch and the policy's log-probabilities of its trained tokens."""
    return LossInputs(
        policy_logprobs_T,
        batch.sampler_logprobs_T,
        batch.advantages_T,
        batch.staleness_T,
        batch.sequence_T,
        max_tokens,
        batch.ref_logprobs_T,
    )


def dealt(
    samples: Sequence[TrainSample],
    max_tokens: int,
    *,
    shared: bool,
    rank: int,
    world: int,
    tiles: PictureTiles | None = None,
) -> list[tuple[list[TrainSample], float]]:
    """A rank's micro-batches of at most `max_tokens` tokens, each with its weight, 1 or 0.

    shared, tiles: as for `micro_batches`.

    Every rank gets the same number of micro-batches, because each forward is collective. If they cannot be divided
    evenly, the last ranks run one sample again, with weight 0.
    """
    chunks = micro_batches(samples, max_tokens, shared=shared, tiles=tiles)
    mine = [(chunk, 1.0) for chunk in chunks[rank::world]]
    rounds = -(-len(chunks) // world)
    return mine + [(chunks[0][:1], 0.0)] * (rounds - len(mine))
