"""The losses of preference pairs.

A loss is a sum over pairs. With `nll_weight`, a sum over the tokens of chosen replies is added. Only `step_share`
divides, by counts of the whole optimizer step, over all its forwards and ranks. So the result of a step does not depend
on how it is split.
Shapes: P pairs of one forward, S tokens of a padded row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairInputs:
    """The pairs of one forward.

    chosen_logprobs_P, rejected_logprobs_P: fp32, summed log-probabilities of each reply under the policy, with
    gradient. The `ref_` fields: the same under the reference, without. chosen_tokens_P, rejected_tokens_P: how many
    tokens each reply has.
    """

    chosen_logprobs_P: torch.Tensor
    rejected_logprobs_P: torch.Tensor
    ref_chosen_logprobs_P: torch.Tensor
    ref_rejected_logprobs_P: torch.Tensor
    chosen_tokens_P: torch.Tensor
    rejected_tokens_P: torch.Tensor

    @property
    def chosen_scores_P(self) -> torch.Tensor:
        """log pi_theta(chosen) - log pi_ref(chosen)."""
        return self.chosen_logprobs_P - self.ref_chosen_logprobs_P

    @property
    def rejected_scores_P(self) -> torch.Tensor:
        """log pi_theta(rejected) - log pi_ref(rejected)."""
        return self.rejected_logprobs_P - self.ref_rejected_logprobs_P

    @property
    def margin_P(self) -> torch.Tensor:
        """How far the policy has moved towards the chosen reply and away from the rejected one, in nats."""
        return self.chosen_scores_P - self.rejected_scores_P

    @property
    def margin_a_token_P(self) -> torch.Tensor:
        """The margin, with the score of each reply divided by its number of tokens."""
        return self.chosen_scores_P / self.chosen_tokens_P - self.rejected_scores_P / self.rejected_tokens_P


def sigmoid(inputs: PairInputs, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * margin). Source: DPO, arXiv 2305.18290, equation 7."""
    return -logsigmoid(beta * inputs.margin_P)


def sigmoid_norm(inputs: PairInputs, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * margin a token). Source: Tulu 3, arXiv 2411.15124, length-normalised DPO."""
    return -logsigmoid(beta * inputs.margin_a_token_P)


def hinge(inputs: PairInputs, beta: float) -> torch.Tensor:
    """max(0, 1 - beta * margin). Source: SLiC, arXiv 2305.10425, in the form of RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * inputs.margin_P)


def ipo(inputs: PairInputs, beta: float) -> torch.Tensor:
    """(margin a token - 1 / (2 beta))^2. Source: IPO, arXiv 2310.12036, equation 17; margin as its authors do."""
    return (inputs.margin_a_token_P - 1 / (2 * beta)).square()


LOSSES: dict[str, Callable[[PairInputs, float], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
}


def step_share(
    losses_P: torch.Tensor, chosen_logprobs_P: torch.Tensor, nll_weight: float, *, counts: torch.Tensor
) -> torch.Tensor:
    """One forward's share of the loss of its optimizer step, a scalar. The shares of all forwards add up to that loss.

    counts: [2], how many pairs and how many chosen tokens the whole step has, over all forwards and ranks.
    """
    pairs, chosen_tokens = counts.unbind()
    return losses_P.sum() / pairs - nll_weight * chosen_logprobs_P.sum() / chosen_tokens
