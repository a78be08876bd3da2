"""Balance experts from one optimizer step to the next, by the load of each expert over the whole step.

All forwards of a step, on all ranks, are counted. The counts serve the next step in two ways:

- A bias on the choice of each expert moves towards even loads, without a loss. Source: "Auxiliary-Loss-Free Load
  Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), algorithm 1. Here the bias is added to logits, because
  Llama 4 chooses experts by logit. A model folder has no place for a bias, and engines route without one. So the bias
  that is applied shrinks during the training, as bias * (1 - progress). At the end it is zero, and the exported router
  routes as it did in training.
- The load-balance loss multiplies the probability of each expert by its load. The load of a step is known only after
  the last forward of the step, when the first forward has already been differentiated. The load of the step before is
  known to all forwards, so this loss does not depend on how a step is split into forwards and ranks. The first step has
  no step before it: its loads count as even, and even loads push no router.

Left out: models that are not the native Llama 4.
Shapes: L mixture-of-experts layers, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.model.native import NativeLlama4Model
from posttrain.model.router_stats import RouterStats, expert_counts, router_stats


def native_layers(model: nn.Module) -> NativeLlama4Model | None:
    """The native layers inside a model and its wrappers; None if it has none, or none with a mixture of experts."""
    found = next((module for module in model.modules() if isinstance(module, NativeLlama4Model)), None)
    return found if found is not None and found.moe_layers else None


class RouterBalance:
    """The bias of every router of a model, the loads of its experts in the last step, and the counts of this step.

    It counts every forward in training mode with gradients, without padding; a token of a packed tree as many times as
    documents have it. A layer that gradient checkpointing
    computes again is not counted again. Call `update` after each optimizer step, on every rank. With a rate of 0 it
    counts and moves no bias. counting: set it to False during forwards that must not be counted.
    """

    def __init__(self, model: nn.Module, rate: float):
        """rate: how far each step moves a bias, in logits. Raises ValueError for a model without native experts."""
        layers = native_layers(model)
        if layers is None:
            raise ValueError(f"{type(model).__name__} has no native mixture-of-experts layers")
        self.rate = rate
        self.progress = 0.0
        self.counting = True
        self._layers = layers
        size = (len(layers.moe_layers), layers.config.num_local_experts)
        self.bias_LE = torch.zeros(size)
        self.load_LE = torch.full(size, 1 / size[1])  # of the last step, as the load-balance loss takes it
        self._counts_LE = torch.zeros(size, dtype=torch.float64)
        self._entropy_L = torch.zeros(size[0], dtype=torch.float64)  # summed over choices
        self._hook = layers.register_forward_hook(self._count)
        self._apply(0.0)

    @torch.no_grad()
    def update(self, progress: float) -> RouterStats | None:
        """Turn the counts of all ranks since the last call into the loads and the bias of the next step. Collective.

        progress: share of the training that is done, 0 to 1; at 1 no bias is applied. Returns the figures of what was
        counted, on the CPU, or None if no token was.
        """
        counts_LE, entropy_L = self._take()
        total_L1 = counts_LE.sum(-1, keepdim=True)
        stats = None
        if total_L1.all():
            self.load_LE = (counts_LE / total_L1).float()
            stats = RouterStats(self.load_LE, (entropy_L / total_L1[:, 0]).float())
            self.bias_LE += self.rate * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE).float()
        self._apply(progress)
        return stats

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: values that JSON holds exactly."""
        return {"bias": self.bias_LE.tolist(), "load": self.load_LE.tolist(), "progress": self.progress}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`."""
        self.bias_LE = torch.tensor(state["bias"])
        self.load_LE = torch.tensor(state["load"])
        self._apply(state["progress"])

    def close(self) -> None:
        """Remove the bias and the loads from the model and stop counting."""
        self._hook.remove()
        self._apply(1.0)
        self._layers.step_load_LE = None

    def _apply(self, progress: float) -> None:
        self.progress = progress
        applied_LE = self.bias_LE * (1 - progress) if self.rate and progress < 1 else None
        device = next(self._layers.parameters()).device
        self._layers.step_load_LE = self.load_LE.to(device)
        for index, layer in enumerate(self._layers.moe_layers):
            layer.choice_bias_E = None if applied_LE is None else applied_LE[index].to(device)

    @torch.no_grad()
    def _count(self, layers: Any, arguments: Any, output: Any) -> None:
        routings, weights_T = layers.last_routings
        if not (self.counting and layers.training and output.last_hidden_state.requires_grad):
            return
        stats = router_stats(routings, weights_T)
        counts_LE = torch.stack([expert_counts(r.expert_ids_TK, r.logits_TE.shape[-1], weights_T) for r in routings])
        self._counts_LE = self._counts_LE.to(counts_LE.device) + counts_LE
        choices_L = counts_LE.sum(-1)
        self._entropy_L = self._entropy_L.to(counts_LE.device) + stats.entropy_L.double().nan_to_num() * choices_L

    def _take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts [L, E] and summed entropy [L] over all ranks, in fp64 on the CPU. Counting then starts from zero."""
        sums = torch.cat([self._counts_LE, self._entropy_L[:, None]], dim=1)
        self._counts_LE, self._entropy_L = torch.zeros_like(self._counts_LE), torch.zeros_like(self._entropy_L)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums[:, :-1].cpu(), sums[:, -1].cpu()
