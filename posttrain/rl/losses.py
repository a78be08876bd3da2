"""Losses of RL. Each returns a sum and names what it is divided by; one place divides, by the whole batch's count.

Two terms go with any of them: the entropy bonus, and the divergence from a reference policy.
The ratio r = pi_theta / pi_sampler is anchored on the log-probabilities that the sampler recorded, so no forward
pass of an old policy is needed. A batch is trained on in one optimizer step: where a form speaks of pi_old, the
trainer's policy before the batch's updates, that is pi_theta itself without a gradient, sg(pi_theta).
No token can make a loss or its gradient infinite or NaN, however far policy, sampler and reference are apart: every
ratio goes through `ratio_of`.
Shapes: T, the reply tokens of a micro-batch; S, its replies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from posttrain.rl.loss_config import LossConfig, ReferenceConfig

# Beyond this log ratio the exponential goes on as its tangent. exp(30) = 1e13: no token that a sampler really drew has
# a ratio like it. The squares of such gradients still add up below fp32's largest number, 3e38, in a batch's norm.
MAX_LOG_RATIO = 30.0


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(log_ratio), and its tangent above MAX_LOG_RATIO = b: exp(b) * (1 + log_ratio - b), finite where exp is not.

    fp32's exp overflows at 88.7. An infinite ratio gives 0 * inf = NaN in the value (advantage or weight 0) or in the
    gradient (a clip that stops the gradient multiplies it by 0), and one such token spoils the step of a whole batch.
    Up to b the value and the gradient are those of exp, bit for bit. A clamp would do for the value, but it has no
    gradient: k3's term would push a policy far below its reference further down, by the 1 of its linear part.
    An infinite or NaN log ratio stays one, for the trainer to find.
    """
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (1 + torch.relu(log_ratio - MAX_LOG_RATIO))


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One entry a reply token; whole replies only, the tokens of a reply side by side.

    policy_logprobs_T (with gradient), sampler_logprobs_T, advantages_T: fp32. The advantage is the same for all tokens
    of a reply. staleness_T: int64, the trainer's policy version minus the version that sampled the token, 0 or more.
    sequence_T: int64, which reply the token belongs to. max_tokens: the longest reply that could be sampled.
    ref_logprobs_T: fp32, of the reference policy, or None where there is none.
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
    """loss_sum: a scalar, not yet divided, and what divides it. metrics: counts of tokens (fractions of them later)."""

    loss_sum: torch.Tensor
    denominator: Literal["tokens", "sequences"]
    metrics: Mapping[str, torch.Tensor]


def dppo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-keep * A * sg(min(r, cap)) * log pi_theta + kl_weight * (log r)^2, summed over tokens.

    keep = 0 where the update would push a probability that has already moved by more than `divergence` further the
    same way: (A > 0 and p_theta - p_sampler > d) or (A <= 0 and p_theta - p_sampler < -d). The bound is on the total
    variation of the token's own binary event, so rare tokens are not masked for a large ratio alone.

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
    """PPO's term -min(r A, clip(r, 1 - low, 1 + high) A), at most -dual * A for A < 0; and where a clip binds."""
    ratio = ratio_of(log_ratio)
    plain = ratio * advantages
    objective = torch.minimum(plain, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual * advantages), objective)
    return -objective, objective != plain


def grpo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), summed over tokens.

    With `dual_clip` = c, a token with A < 0 costs at most -c A: beyond r = c it has no gradient.

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

    So each token weighs 1 / (sequences * max_tokens) whatever the length of its reply: no long wrong reply is made
    cheap by its length. The paper's formula has the mean over sequences only; its authors' code divides by the
    generation budget too, a constant, which keeps gradients in the range of the other losses.

    Source: Dr. GRPO, arXiv 2503.20783 (its advantage is `group_mean`).
    """
    outputs = grpo(inputs, config)
    return LossOutputs(outputs.loss_sum / inputs.max_tokens, "sequences", outputs.metrics)


def cispo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-sg(min(r, cispo_cap)) * A * log pi_theta, summed over tokens.

    No token loses its gradient; only its weight is cut.

    Source: CISPO, arXiv 2506.13585, without a lower clip; the cap as in ScaleRL, arXiv 2510.13786.
    """
    with torch.no_grad():
        ratio_T = ratio_of(inputs.policy_logprobs_T - inputs.sampler_logprobs_T)
        weight_T = ratio_T.clamp(max=config.cispo_cap) * inputs.advantages_T
    loss_T = -weight_T * inputs.policy_logprobs_T
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": (ratio_T > config.cispo_cap).sum()})


def gspo(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-min(s A, clip(s, 1 - sequence_clip_low, 1 + sequence_clip_high) A), summed over sequences.

    s = exp(mean over the reply's tokens of log r): one ratio a reply. `clipped_fraction` counts the tokens of clipped
    replies.

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

    pi_old = sg(pi_theta), so the ratio is 1 with the gradient of log pi_theta, and PPO's clip on it never binds.

    Source: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training".
    """
    ratio_T, rho_T = _on_policy(inputs)
    loss_T = -rho_T.clamp(max=config.tis_cap) * inputs.advantages_T * ratio_T
    return LossOutputs(loss_T.sum(), "tokens", {"clipped_fraction": (rho_T > config.tis_cap).sum()})


def icepop(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """-sg(rho * [icepop_low <= rho <= icepop_high]) * A * pi_theta / pi_old, summed over tokens; rho as in `tis`.

    A token on which sampler and trainer disagree beyond the bounds, either way, is left out of the sum, but counts
    in the denominator.

    Source: IcePop, arXiv 2510.18855 (Ring-1T).
    """
    ratio_T, rho_T = _on_policy(inputs)
    keep_T = (rho_T >= config.icepop_low) & (rho_T <= config.icepop_high)
    loss_T = -torch.where(keep_T, rho_T, 0.0) * inputs.advantages_T * ratio_T
    return LossOutputs(loss_T.sum(), "tokens", {"masked_fraction": (~keep_T).sum()})


def _on_policy(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """pi_theta / pi_old, which is 1 and has the gradient of log pi_theta; and pi_old / pi_sampler, which has none."""
    old_T = inputs.policy_logprobs_T.detach()
    return ratio_of(inputs.policy_logprobs_T - old_T), ratio_of(old_T - inputs.sampler_logprobs_T)


def decoupled(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """sg(min(w, decoupled_cap)) times the terms of `grpo` on pi_theta / pi_prox, summed over tokens.

    w = pi_prox / pi_sampler, and log pi_prox = log pi_sampler + alpha * (log pi_theta - log pi_sampler) without a
    gradient. With d = staleness of the token, alpha = max(0, d - 1) / d, and 0 for d = 0: the proximal policy lies one
    version behind the trainer's. So tokens up to one version old have the terms of `grpo`, and the clip is on the d-th
    root of r for older ones.

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


# Of KL(policy, reference), from l = log pi_theta - log pi_ref of a token that the policy sampled.
KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: ratio_of(-log_ratio) - 1 + log_ratio,
}


def reference_kl(inputs: LossInputs, config: ReferenceConfig, estimator: str | None = None) -> torch.Tensor:
    """sg(min(r, ratio_cap)) * k(l) of each token, fp32 [T]; k is `estimator`, by default the config's.

    With l = log pi_theta - log pi_ref: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l. As values under the policy, k1 and
    k3 have the mean KL(pi_theta, pi_ref), k2 nearly so where the two are close. As terms of a loss it is their
    gradients that count. With respect to log pi_theta they are 1, l and 1 - pi_ref / pi_theta, so in expectation under
    the policy, the prefix of the token taken as given,
        k1: E[grad log pi_theta] = 0; the score function alone, noise without a direction;
        k2: E[l grad log pi_theta] = grad KL(pi_theta, pi_ref), the right one;
        k3: -E[(pi_ref / pi_theta) grad log pi_theta] = grad KL(pi_ref, pi_theta), of the other direction.
    Tokens come from the sampler, so these expectations need the weight r = pi_theta / pi_sampler, which has no
    gradient. It is capped, and left out (GRPO has none) where ratio_cap is None.

    Raises ValueError where the inputs have no ref_logprobs_T.

    Source: J. Schulman 2020, "Approximating KL Divergence"; k3 as a loss: GRPO, arXiv 2402.03300; the gradients: arXiv
    2510.01555, which also asks for the weight.
    """
    if inputs.ref_logprobs_T is None:
        raise ValueError("loss.reference is set, but the samples have no log-probabilities of the reference policy")
    terms_T = KL_ESTIMATORS[estimator or config.estimator](inputs.policy_logprobs_T - inputs.ref_logprobs_T)
    if config.ratio_cap is None:
        return terms_T
    with torch.no_grad():
        log_ratio_T = inputs.policy_logprobs_T - inputs.sampler_logprobs_T
        weight_T = ratio_of(log_ratio_T).clamp(max=config.ratio_cap)
    return weight_T * terms_T


def batch_share(
    outputs: LossOutputs,
    inputs: LossInputs,
    entropy_T: torch.Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    config: LossConfig,
) -> torch.Tensor:
    """A micro-batch's share of its batch's loss, a scalar.

    loss_sum / denominator - entropy_bonus * mean entropy + reference.weight * mean of `reference_kl`

    entropy_T: nats, with gradient. num_tokens, num_sequences: of the whole batch, over all ranks; the means are over
    its tokens. The shares of all micro-batches add up to the loss of the batch, however it is split.
    """
    divisor = {"tokens": num_tokens, "sequences": num_sequences}[outputs.denominator]
    loss = outputs.loss_sum / divisor
    if config.entropy_bonus:
        loss = loss - config.entropy_bonus * entropy_T.sum() / num_tokens
    if config.reference is not None:
        loss = loss + config.reference.weight * reference_kl(inputs, config.reference).sum() / num_tokens
    return loss
