"""Adapters (LoRA) in RL's trainer: put into the policy, switched off for the reference, changed for the parity check.

New adapters change no log-probability, so an engine that is sent the weights without them would pass the check of
engines and trainer, and every later step would be silently wrong. So the check is also made with adapters that matter:
`AdapterProbe` gives them random values and takes the values back afterwards, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from posttrain.config.training import AdaptersConfig
from posttrain.parallel.tensors import adapted_weight, gathered
from posttrain.tune.adapters import adapter_config


def add_adapters(policy: Any, lora: AdaptersConfig) -> None:
    """Put new adapters into a causal language model, in place. All its other weights are frozen.

    Raises `ConfigError` for a target that the model lacks.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapter_config(policy, lora), policy)


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Within the block the policy is the model without its adapters: what they add is multiplied by 0."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(policy, 0.0):
        yield


class AdapterProbe:
    """Random values in the adapters of a policy, for the parity check. Collective: every rank calls it alike."""

    def __init__(self, policy: nn.Module):
        from peft.tuners.lora import LoraLayer

        self._layers: list[Any] = [module for module in policy.modules() if isinstance(module, LoraLayer)]
        self._held: list[torch.Tensor] = []

    def set(self, size: float) -> None:
        """Give B of each adapter random values. What an adapter adds then has `size` times the norm of its weight."""
        self.restore()
        generator = torch.Generator().manual_seed(0)
        for layer in self._layers:
            (name,) = layer.active_adapters
            weight, a, b = adapted_weight(layer), layer.lora_A[name].weight, layer.lora_B[name].weight
            with torch.no_grad(), gathered((weight, a, b), changed=True):
                self._held.append(b.detach().to("cpu", copy=True))
                b.copy_(torch.randn(b.shape, generator=generator))
                b.mul_(size * weight.norm() / layer.get_delta_weight(name).norm())

    def restore(self) -> None:
        """Give the adapters the values that they had before `set`."""
        for layer, value in zip(self._layers if self._held else (), self._held, strict=True):
            (name,) = layer.active_adapters
            b = layer.lora_B[name].weight
            with torch.no_grad(), gathered((b,), changed=True):
                b.copy_(value)
        self._held = []
