"""Losses of RL. Each returns a sum over tokens and names what it is divided by; one place divides, by the global count.

The ratio r = pi_theta / pi_sampler is anchored on the log-probabilities that the sampler recorded, so no forward
pass of an old policy is needed. Shapes: T, the reply tokens of a micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from posttrain.rl.config import LossConfig


@dataclass(frozen=True, slots=True)
class LossInputs:
    """policy_logprobs_T (with gradient), sampler_logprobs_T and advantages_T are fp32, one entry a reply token."""

    policy_logprobs_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss_sum: a scalar, not yet divided. metrics: sums over the tokens (to be divided likewise)."""

    loss_sum: torch.Tensor
    denominator: Literal["tokens", "sequences"]
    metrics: Mapping[str, torch.Tensor]


def dppo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-keep * A * sg(min(r, cap)) * log pi_theta + kl_weight * (log r)^2, summed over tokens.

    keep = 0 where the update would push a probability that has already moved by more than `divergence` further the
    same way: (A > 0 and p_theta - p_sampler > d) or (A <= 0 and p_theta - p_sampler < -d). The bound is on the total
    variation of the token's own binary event, so rare tokens are not masked for a large ratio alone.

    Source: DPPO with the binary total-variation mask, the default loss of prime-rl.
    """
    log_ratio_T = inputs.policy_logprobs_T - inputs.sampler_logprobs_T
    with torch.no_grad():
        ratio_T = log_ratio_T.exp()
        moved_T = inputs.policy_logprobs_T.exp() - inputs.sampler_logprobs_T.exp()
        up_T = (inputs.advantages_T > 0) & (moved_T > config.divergence)
        down_T = (inputs.advantages_T <= 0) & (moved_T < -config.divergence)
        keep_T = ~(up_T | down_T)
        weight_T = keep_T * inputs.advantages_T * ratio_T.clamp(max=config.ratio_cap)
    loss_T = -weight_T * inputs.policy_logprobs_T + config.kl_weight * log_ratio_T.square()
    return LossOutputs(loss_T.sum(), "tokens", {"masked_fraction": (~keep_T).sum()})


def grpo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), summed over tokens.

    Source: PPO's clipped objective with GRPO's advantages (arXiv 2402.03300, equation 3) and clip-higher and the
    token-level mean of DAPO (arXiv 2503.14476, equations 8 and 10).
    """
    ratio_T = (inputs.policy_logprobs_T - inputs.sampler_logprobs_T).exp()
    clipped_T = ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    plain_T, bounded_T = ratio_T * inputs.advantages_T, clipped_T * inputs.advantages_T
    loss_T = -torch.minimum(plain_T, bounded_T)
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": (bounded_T < plain_T).sum()})


LOSSES: dict[str, Callable[[LossInputs, LossConfig], LossOutputs]] = {"dppo": dppo, "grpo": grpo}
