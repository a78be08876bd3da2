"""What an optimizer step minimises: a loss divided by the count of the whole batch, and the terms that fit any loss.

    loss_sum / denominator  -  entropy_bonus * mean entropy  +  reference.weight * mean divergence from a reference

The notation and the shapes are those of losses.py.
"""

from collections.abc import Callable

import torch

from posttrain.rl.loss_config import LossConfig, ReferenceConfig
from posttrain.rl.losses import LossInputs, LossOutputs, ratio_of

# Estimators of KL(policy, reference). Each takes l = log pi_theta - log pi_ref of tokens; see `reference_kl`.
KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: ratio_of(-log_ratio) - 1 + log_ratio,
}


def reference_kl(inputs: LossInputs, config: ReferenceConfig, estimator: str | None = None) -> torch.Tensor:
    """sg(min(r, ratio_cap)) * k(l) of each token, fp32 [T]. k is `estimator`, or the config's if that is None.

    With l = log pi_theta - log pi_ref, the estimators are k1 = l, k2 = l^2 / 2 and k3 = exp(-l) - 1 + l.

    Their values: over tokens that the policy sampled, the mean of k1 and of k3 is KL(pi_theta, pi_ref). That of k2 is
    close to it if the two policies are close.

    Their gradients, which are what counts in a loss, are different. With respect to log pi_theta they are 1, l and
    1 - pi_ref / pi_theta. So, given the tokens before it, the expectation over a token that the policy samples is
        k1: E[grad log pi_theta] = 0, noise without a direction;
        k2: E[l grad log pi_theta] = grad KL(pi_theta, pi_ref), the gradient that a penalty should have;
        k3: -E[(pi_ref / pi_theta) grad log pi_theta] = grad KL(pi_ref, pi_theta), that of the reverse divergence.

    Tokens were sampled by the sampler and not by the policy. The weight r = pi_theta / pi_sampler, without a gradient,
    corrects the expectations for this. It is capped at ratio_cap. With ratio_cap None there is no weight, as in GRPO.

    Raises ValueError if the inputs have no ref_logprobs_T.

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
    """A micro-batch's share of the loss of its batch, a scalar:

        loss_sum / denominator - entropy_bonus * mean entropy + reference.weight * mean of `reference_kl`

    entropy_T: nats, with gradient. num_tokens, num_sequences: counts of the whole batch, over all ranks. The means
    divide by the tokens of the whole batch too, so the shares of all micro-batches add up to the batch's loss however
    the batch is split.
    """
    divisor = {"tokens": num_tokens, "sequences": num_sequences}[outputs.denominator]
    loss = outputs.loss_sum / divisor
    if config.entropy_bonus:
        loss = loss - config.entropy_bonus * entropy_T.sum() / num_tokens
    if config.reference is not None:
        loss = loss + config.reference.weight * reference_kl(inputs, config.reference).sum() / num_tokens
    return loss
