"""Adapters (LoRA) in RL's trainer: put into the policy, taken out or set back for the reference, changed for a check.

New adapters change no log-probability, so an engine that is sent the weights without them would pass the check of
engines and trainer, and every later step would be silently wrong. So the check is also made with adapters that matter:
`AdapterProbe` gives them random values and takes the values back afterwards, bit for bit.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from posttrain.config.training import AdaptersConfig, Part
from posttrain.parallel.tensors import adapted_weight, gathered
from posttrain.tune.adapters import adapter_config


def add_adapters(policy: Any, lora: AdaptersConfig, frozen: Collection[Part] = ()) -> None:
    """Put new adapters into a causal language model, in place, except into frozen parts. Other weights are not trained.

    Raises `ConfigError` for a target that the model lacks.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapter_config(policy, lora, frozen), policy)


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Within the block the policy is the model without its adapters: what they add is multiplied by 0."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(policy, 0.0):
        yield


class StartAdapters:
    """The values of adapters that a training goes on with, as they are when this is made. Copies lie on the CPU."""

    def __init__(self, policy: nn.Module):
        self._layers = _layers(policy)
        self._values = [_copies(layer) for layer in self._layers]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the adapters have these values. Collective: every rank enters and leaves it."""
        held = [_copies(layer) for layer in self._layers]
        self._give(self._values)
        try:
            yield
        finally:
            self._give(held)

    def _give(self, values: list[list[torch.Tensor]]) -> None:
        for layer, those in zip(self._layers, values, strict=True):
            weights = _weights(layer)
            with torch.no_grad(), gathered(weights, changed=True):
                for weight, value in zip(weights, those, strict=True):
                    weight.copy_(value)


class AdapterProbe:
    """Random values in the adapters of a policy, for the parity check. Collective: every rank calls it alike."""

    def __init__(self, policy: nn.Module):
        self._layers = _layers(policy)
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


def _layers(policy: nn.Module) -> list[Any]:
    """The layers that have an adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in policy.modules() if isinstance(module, LoraLayer)]


def _weights(layer: Any) -> tuple[nn.Parameter, ...]:
    """A and B of a layer's adapter."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _copies(layer: Any) -> list[torch.Tensor]:
    weights = _weights(layer)
    with gathered(weights):
        return [weight.detach().to("cpu", copy=True) for weight in weights]
