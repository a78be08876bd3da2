"""The module that the trainer's engine holds: it maps token ids to log-probabilities of given tokens.

The product with the head is computed here and not by the head's own layer, so that a step never holds the logits of a
whole batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.config.images import TrainedImagesConfig
from posttrain.config.models import ModelConfig
from posttrain.config.training import AdaptersConfig, GradientCheckpointing
from posttrain.model.adapter_start import continues
from posttrain.model.load import load_policy
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.router_balance import native_layers
from posttrain.model.sharing import accept_trees, tree_arguments
from posttrain.model.vision.parts import freeze
from posttrain.model.vision.tiling import PictureTiles, tiles_for
from posttrain.parallel.adapters import with_adapters
from posttrain.rl.training.adapters import add_adapters
from posttrain.rl.training.batches import MicroBatch, collate, micro_batches
from posttrain.rl.training.samples import TrainSample
from posttrain.train.logprobs import token_logprobs

PAD_ID = 0  # any id will do: padding is on the right, where no reply token sees it


class TokenPolicy(nn.Module):
    """A causal language model, in the attribute `policy`, that is called with a `MicroBatch`.

    shares_prefixes: whether samples share what they have in common in a micro-batch. tiles: of the pictures of samples;
    None for a policy that is shown none. `micro_batches` and `collate` are to be told both.
    """

    def __init__(
        self, policy: Any, temperature: float, *, shared_prefixes: bool = True, tiles: PictureTiles | None = None
    ):
        super().__init__()
        self.policy = policy
        self.tiles = tiles
        self.config = policy.config.get_text_config()  # from which DeepSpeed reads the sizes of the experts
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
        layers = self.policy.model if self.tiles is None else self.policy.backbone
        output = layers(input_ids=batch.input_ids_BS, **arguments, **batch.pictures)
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
    images: TrainedImagesConfig | None = None,
    store: Path | None = None,
) -> TokenPolicy:
    """Load the policy of a model folder onto the CPU.

    temperature: that of sampling. lora: the adapters to train: new ones, or those in the folder. images: how a
    multimodal policy is trained; store: the file of its pictures. None for a policy of text.
    """
    policy: Any = load_policy(model, images=images is not None)
    tiles = None
    if images is not None:
        assert store is not None
        freeze(policy, images.freeze)
        tiles = tiles_for(store, model.path)
    if lora is not None and continues(model):
        with_adapters(policy, model.path, trainable=True)
    elif lora is not None:
        add_adapters(policy, lora, () if images is None else images.freeze)
    if gradient_checkpointing != "none":
        policy.gradient_checkpointing_enable(checkpointing_arguments(gradient_checkpointing))
    return TokenPolicy(policy, temperature, shared_prefixes=shared_prefixes, tiles=tiles)


def sample_logprobs(policy: Any, samples: Sequence[TrainSample], max_tokens: int, *, device: str) -> list[list[float]]:
    """Log-probabilities of each sample's reply tokens, without gradients, in the order given.

    policy: a `TokenPolicy`, or an engine around one. max_tokens: of one forward pass.
    """
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        layout: dict[str, Any] = {"shared": policy.shares_prefixes, "tiles": policy.tiles}
        for chunk in micro_batches(samples, max_tokens, **layout):
            values_T, *_ = policy(collate(chunk, PAD_ID, device, **layout))
            parts = values_T.cpu().split([sample.num_trained for sample in chunk])
            found |= {id(sample): part.tolist() for sample, part in zip(chunk, parts, strict=True)}
    return [found[id(sample)] for sample in samples]
