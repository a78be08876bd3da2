"""The module that the trainer's engine holds: it maps token ids to log-probabilities of given tokens.

The product with the head is computed here and not by the head's own layer, so that a step never holds the logits of a
whole batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from posttrain.config.models import ModelConfig
from posttrain.config.training import AdaptersConfig, GradientCheckpointing
from posttrain.model.adapter_start import continues
from posttrain.model.load import load_policy
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.router_balance import native_layers
from posttrain.model.sharing import accept_trees, tree_arguments
from posttrain.parallel.adapters import with_adapters
from posttrain.rl.training.adapters import add_adapters
from posttrain.rl.training.batches import MicroBatch, collate, micro_batches
from posttrain.rl.training.samples import TrainSample
from posttrain.train.logprobs import token_logprobs

PAD_ID = 0  # any id will do: padding is on the right, where no reply token sees it


class TokenPolicy(nn.Module):
    """A causal language model, in the attribute `policy`, that is called with a `MicroBatch`.

    shares_prefixes: whether samples share what they have in common in a micro-batch, as `micro_batches` and `collate`
    are to be told.
    """

    def __init__(self, policy: Any, temperature: float, *, shared_prefixes: bool = True):
        super().__init__()
        self.policy = policy
        self.config = policy.config  # from which DeepSpeed reads the sizes of the experts
        self._temperature = temperature
        self._has_routers = native_layers(policy) is not None
        self.shares_prefixes = shared_prefixes and accept_trees(policy) is None

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability of each target and entropy of its distribution, both fp32 [T]; loss on routers, a scalar.

        The loss on routers is a mean over real tokens, weighted already. It is 0 if the config asks for none.
        """
        if batch.tree is not None:
            arguments = tree_arguments(self.policy, batch.tree)
        else:
            # Padding is on the right, so attention needs no mask; losses on routers need one, to leave padding out.
            mask = {"attention_mask": batch.mask_BS} if self._has_routers else {}
            arguments = {"use_cache": False, **mask}
        output = self.policy.model(input_ids=batch.input_ids_BS, **arguments)
        hidden_TD = output.last_hidden_state.flatten(0, 1)[batch.position_T]
        head_VD = self.policy.get_output_embeddings().weight
        logprobs_T, entropy_T = token_logprobs(
            hidden_TD, head_VD, batch.target_T, temperature=self._temperature, entropy=True
        )
        assert entropy_T is not None
        router_loss = getattr(output, "router_loss", None)
        return logprobs_T, entropy_T, logprobs_T.new_zeros(()) if router_loss is None else router_loss

    def share_head(self) -> None:
        """Tell ZeRO-3, which divides every parameter, that this module needs the whole weight of the head."""
        import deepspeed

        deepspeed.zero.register_external_parameter(self, self.policy.get_output_embeddings().weight)


def load_token_policy(
    model: ModelConfig,
    temperature: float,
    gradient_checkpointing: GradientCheckpointing = "none",
    *,
    shared_prefixes: bool = True,
    lora: AdaptersConfig | None = None,
) -> TokenPolicy:
    """Load the policy of a model folder onto the CPU.

    temperature: that of sampling. lora: the adapters to train: new ones, or those in the folder.
    """
    policy: Any = load_policy(model)
    if lora is not None and continues(model):
        with_adapters(policy, model.path, trainable=True)
    elif lora is not None:
        add_adapters(policy, lora)
    if gradient_checkpointing != "none":
        policy.gradient_checkpointing_enable(checkpointing_arguments(gradient_checkpointing))
    return TokenPolicy(policy, temperature, shared_prefixes=shared_prefixes)


def sample_logprobs(policy: Any, samples: Sequence[TrainSample], max_tokens: int, *, device: str) -> list[list[float]]:
    """Log-probabilities of each sample's reply tokens, without gradients, in the order given.

    policy: a `TokenPolicy`, or an engine around one. max_tokens: of one forward pass.
    """
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for chunk in micro_batches(samples, max_tokens, shared=policy.shares_prefixes):
            values_T, *_ = policy(collate(chunk, PAD_ID, device, shared=policy.shares_prefixes))
            parts = values_T.cpu().split([sample.num_trained for sample in chunk])
            found |= {id(sample): part.tolist() for sample, part in zip(chunk, parts, strict=True)}
    return [found[id(sample)] for sample in samples]
