"""The losses of RL.

Each loss is a function that returns a sum and names its denominator, tokens or sequences. Only `batch_share`
(objective.py) divides, by the count of the whole batch, and adds the terms that fit any loss.

The notation of the docstrings:

  pi_theta    the policy that is being trained
  pi_sampler  the policy that sampled the token, as the engine recorded its log-probability
  pi_old      the trainer's policy before the updates of a batch, of which some papers speak. Here a batch is trained on
              in one optimizer step, so pi_old is pi_theta without a gradient, sg(pi_theta)
  r           pi_theta / pi_sampler, of one token. Because the sampler's log-probabilities are recorded, no forward
              pass of an old policy is needed
  A           the token's advantage
  sg(x)       x without a gradient

No finite log-probabilities, however far policy, sampler and reference are apart, make a loss or its gradient infinite
or NaN: every ratio is computed by `ratio_of`.
Shapes: T, the reply tokens of a micro-batch; S, its replies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from posttrain.rl.loss_config import LossConfig

# Above this log ratio `ratio_of` replaces the exponential by its tangent. exp(30) = 1e13 is far above the ratio of any
# token that a sampler really drew, and small enough that the squares of such gradients, summed for the gradient norm of
# a batch, stay below fp32's largest number, 3e38.
MAX_LOG_RATIO = 30.0


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(log_ratio) up to b = MAX_LOG_RATIO; above b the tangent of exp in b, exp(b) * (1 + log_ratio - b).

    Up to b, value and gradient are those of exp, bit for bit. The tangent is there because fp32's exp overflows at
    88.7. An infinite ratio becomes NaN (0 * inf) in the value if the advantage or a weight is 0, and in the gradient if
    a clip multiplies the gradient by 0. One such token spoils the step of the whole batch.

    A clamp would keep the value finite too, but a clamped value has no gradient. Of the k3 penalty (`reference_kl`)
    only the gradient of its linear part, 1, would then be left, and that pushes a policy which is far below its
    reference further down.

    An infinite or NaN log_ratio gives an infinite or NaN ratio, which the trainer finds and reports.
    """
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (1 + torch.relu(log_ratio - MAX_LOG_RATIO))


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The reply tokens of a micro-batch, one entry for each token. Replies are whole, and their tokens consecutive.

    policy_logprobs_T (with gradient), sampler_logprobs_T, advantages_T: fp32. All tokens of a reply have the same
    advantage, or all tokens of a turn. staleness_T: int64, the trainer's policy version minus the version that sampled
    the token, 0 or more.
    sequence_T: int64, the number of the token's reply. max_tokens: the longest reply that could be sampled.
    ref_logprobs_T: fp32, log-probabilities under the reference policy, or None without one.

    Example: two replies of 2 tokens and 1 token have sequence_T = [0, 0, 1] and advantages_T = [0.5, 0.5, -0.5].
    """

    policy_logprobs_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    staleness_T: torch.Tensor
    sequence_T: torch.Tensor
    max_tokens: int
    ref_logprobs_T: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss_sum: a scalar that is not divided yet. denominator: whose count in the batch divides it.

    metrics: counts of tokens; the trainer divides them by the batch's tokens, so that they become fractions.
    """

    loss_sum: torch.Tensor
    denominator: Literal["tokens", "sequences"]
    metrics: Mapping[str, torch.Tensor]


def dppo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-keep * A * sg(min(r, cap)) * log pi_theta + kl_weight * (log r)^2, summed over tokens.

    keep = 0 masks a token whose probability has already moved by more than d = `divergence`, if the update would move
    it further in that direction: (A > 0 and p_theta - p_sampler > d) or (A <= 0 and p_theta - p_sampler < -d).
    Otherwise keep = 1. The difference of the two probabilities is the total variation between policy and sampler, as
    far as the choice "this token or another" goes. A rare token can have a large ratio at a small difference, and is
    then not masked.

    Source: DPPO, arXiv 2602.04879, with its binary total-variation mask; cap and squared term as in prime-rl's default
    loss.
    """
    log_ratio_T = inputs.policy_logprobs_T - inputs.sampler_logprobs_T
    with torch.no_grad():
        ratio_T = ratio_of(log_ratio_T)
        moved_T = inputs.policy_logprobs_T.exp() - inputs.sampler_logprobs_T.exp()
        up_T = (inputs.advantages_T > 0) & (moved_T > config.divergence)
        down_T = (inputs.advantages_T <= 0) & (moved_T < -config.divergence)
        keep_T = ~(up_T | down_T)
        weight_T = keep_T * inputs.advantages_T * ratio_T.clamp(max=config.ratio_cap)
    loss_T = -weight_T * inputs.policy_logprobs_T + config.kl_weight * log_ratio_T.square()
    return LossOutputs(loss_T.sum(), "tokens", {"masked_fraction": (~keep_T).sum()})


def _clipped(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, low: float, high: float, dual: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's term -min(r A, clip(r, 1 - low, 1 + high) A), and a mask of the entries that a clip changed.

    dual: if set, the term is at most -dual * A where A < 0. Arguments and results are of tokens or of sequences.
    """
    ratio = ratio_of(log_ratio)
    plain = ratio * advantages
    objective = torch.minimum(plain, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual * advantages), objective)
    return -objective, objective != plain


def grpo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), summed over tokens.

    With `dual_clip` = c, a token with A < 0 adds at most -c A to the loss. Above r = c it has no gradient.

    Source: PPO's clipped objective with GRPO's advantages (arXiv 2402.03300) and clip-higher and the token-level mean
    of DAPO (arXiv 2503.14476); dual clip: arXiv 1912.09729.
    """
    log_ratio_T = inputs.policy_logprobs_T - inputs.sampler_logprobs_T
    loss_T, clipped_T = _clipped(
        log_ratio_T, inputs.advantages_T, low=config.clip_low, high=config.clip_high, dual=config.dual_clip
    )
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": clipped_T.sum()})


def dr_grpo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """The terms of `grpo`, summed over tokens and divided by max_tokens; the batch divides by its sequences.

    So each token has the weight 1 / (sequences * max_tokens), whatever the length of its reply. With a mean over the
    tokens of each reply, a wrong reply would be punished less at each token the longer it is. The paper's formula has
    the mean over sequences only. Its authors' code divides by the longest reply allowed too, a constant, which keeps
    gradients in the range of the other losses.

    Source: Dr. GRPO, arXiv 2503.20783 (its advantage is `group_mean`).
    """
    outputs = grpo(inputs, config)
    return LossOutputs(outputs.loss_sum / inputs.max_tokens, "sequences", outputs.metrics)


def cispo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-sg(min(r, cispo_cap)) * A * log pi_theta, summed over tokens.

    Every token keeps its gradient; the cap limits only its weight.

    Source: CISPO, arXiv 2506.13585, without a lower clip; the cap as in ScaleRL, arXiv 2510.13786.
    """
    with torch.no_grad():
        ratio_T = ratio_of(inputs.policy_logprobs_T - inputs.sampler_logprobs_T)
        weight_T = ratio_T.clamp(max=config.cispo_cap) * inputs.advantages_T
    loss_T = -weight_T * inputs.policy_logprobs_T
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": (ratio_T > config.cispo_cap).sum()})


def gspo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-min(s A, clip(s, 1 - sequence_clip_low, 1 + sequence_clip_high) A), summed over sequences.

    s = exp(mean over the reply's tokens of log r) is one ratio for the whole reply. `clipped_fraction` counts the
    tokens of clipped replies.

    Source: GSPO, arXiv 2507.18071, equation 5; constants of its section 5.1.
    """
    _, of_sequence_T, length_S = inputs.sequence_T.unique_consecutive(return_inverse=True, return_counts=True)

    def mean_S(values_T: torch.Tensor) -> torch.Tensor:
        return values_T.new_zeros(len(length_S)).index_add(0, of_sequence_T, values_T) / length_S

    log_ratio_S = mean_S(inputs.policy_logprobs_T - inputs.sampler_logprobs_T)
    loss_S, clipped_S = _clipped(
        log_ratio_S, mean_S(inputs.advantages_T), low=config.sequence_clip_low, high=config.sequence_clip_high
    )
    return LossOutputs(loss_S.sum(), "sequences", {"clipped_fraction": (clipped_S * length_S).sum()})


def tis(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-sg(min(rho, tis_cap)) * A * pi_theta / pi_old, summed over tokens; rho = pi_old / pi_sampler.

    Since pi_old = sg(pi_theta), pi_theta / pi_old is 1, with the gradient of log pi_theta, and PPO's clip never
    changes it.

    Source: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training".
    """
    ratio_T, rho_T = _on_policy(inputs)
    loss_T = -rho_T.clamp(max=config.tis_cap) * inputs.advantages_T * ratio_T
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": (rho_T > config.tis_cap).sum()})


def icepop(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-sg(rho * [icepop_low <= rho <= icepop_high]) * A * pi_theta / pi_old, summed over tokens; rho as in `tis`.

    If rho of a token is outside the bounds, so that sampler and trainer disagree about it, the token is left out of the
    sum. It still counts in the denominator.

    Source: IcePop, arXiv 2510.18855 (Ring-1T).
    """
    ratio_T, rho_T = _on_policy(inputs)
    keep_T = (rho_T >= config.icepop_low) & (rho_T <= config.icepop_high)
    loss_T = -torch.where(keep_T, rho_T, 0.0) * inputs.advantages_T * ratio_T
    return LossOutputs(loss_T.sum(), "tokens", {"masked_fraction": (~keep_T).sum()})


def _on_policy(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Two ratios: pi_theta / pi_old, which is 1 with the gradient of log pi_theta; pi_old / pi_sampler, without one."""
    old_T = inputs.policy_logprobs_T.detach()
    return ratio_of(inputs.policy_logprobs_T - old_T), ratio_of(old_T - inputs.sampler_logprobs_T)


def decoupled(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """sg(min(w, decoupled_cap)) times the terms of `grpo` on pi_theta / pi_prox, summed over tokens.

    pi_prox, the proximal policy, stands for the trainer's policy of one version ago. It is interpolated, without a
    gradient: log pi_prox = log pi_sampler + alpha * (log pi_theta - log pi_sampler), where a token of staleness d has
    alpha = (d - 1) / d, and alpha = 0 if d = 0. The weight is w = pi_prox / pi_sampler.

    So a token of staleness 0 or 1 has the term of `grpo`. For an older token the clip is on pi_theta / pi_prox, which
    is the d-th root of r.

    Source: decoupled PPO, arXiv 2505.24298 (AReaL); pi_prox without a forward pass: A-3PO, arXiv 2512.06547.
    """
    with torch.no_grad():
        alpha_T = (inputs.staleness_T - 1).clamp(min=0) / inputs.staleness_T.clamp(min=1)
        log_weight_T = alpha_T * (inputs.policy_logprobs_T - inputs.sampler_logprobs_T)
        prox_T = inputs.sampler_logprobs_T + log_weight_T
        weight_T = ratio_of(log_weight_T).clamp(max=config.decoupled_cap)
    loss_T, clipped_T = _clipped(
        inputs.policy_logprobs_T - prox_T,
        inputs.advantages_T,
        low=config.clip_low,
        high=config.clip_high,
        dual=config.dual_clip,
    )
    return LossOutputs((weight_T * loss_T).sum(), "tokens", {"clipped_fraction": clipped_T.sum()})


LOSSES: dict[str, Callable[[LossInputs, LossConfig], LossOutputs]] = {
    "dppo": dppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "cispo": cispo,
    "gspo": gspo,
    "tis": tis,
    "icepop": icepop,
    "decoupled": decoupled,
}
