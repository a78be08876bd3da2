"""The policy as the trainer's engine holds it: token ids in, log-probabilities of given tokens out.

The head is multiplied here and not by its own layer, so that no step holds the logits of a whole batch.
"""

from typing import Any

import torch
from torch import nn

from posttrain.train.logprobs import token_logprobs


class TokenPolicy(nn.Module):
    """A causal language model under `policy`, called with a micro-batch."""

    def __init__(self, policy: Any, temperature: float):
        super().__init__()
        self.policy = policy
        self.config = policy.config  # DeepSpeed reads the sizes of the experts there
        self._temperature = temperature

    def forward(
        self, input_ids_BS: torch.Tensor, position_T: torch.Tensor, target_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target and entropy of its distribution, fp32 [T] both.

        position_T: index into the flattened [B * S] hidden states of the state that predicts each target.
        """
        hidden_BSD = self.policy.model(input_ids=input_ids_BS, use_cache=False).last_hidden_state
        hidden_TD = hidden_BSD.flatten(0, 1)[position_T]
        head_VD = self.policy.get_output_embeddings().weight
        logprobs_T, entropy_T = token_logprobs(hidden_TD, head_VD, target_T, self._temperature, entropy=True)
        assert entropy_T is not None
        return logprobs_T, entropy_T

    def share_head(self) -> None:
        """Tell ZeRO-3, which divides every parameter, that this module needs the head's whole weight."""
        import deepspeed

        deepspeed.zero.register_external_parameter(self, self.policy.get_output_embeddings().weight)
