"""The optimizer Muon: momentum, whose update is made nearly orthogonal. The matrices are divided among the processes.

Each process keeps the momentum of its own matrices, makes their updates orthogonal, and sends them to the others. So
the step takes 1/N of the time, and every process ends with the same weights.

Source: Muon (Jordan et al. 2024), Nesterov momentum and the quintic Newton-Schulz iteration with its coefficients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Push the singular values of matrices [..., M, N] towards 1; fp32 in, fp32 out."""
    transposed = update.shape[-2] > update.shape[-1]
    x = update.transpose(-1, -2) if transposed else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if transposed else x


class Muon:
    """One optimizer over all processes of the default process group; over this process alone if there is no group.

    parameters: matrices, or stacks of matrices [E, M, N]. Every process gives the same list in the same order.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95):
        self._momentum = momentum
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._shares = _share_out(parameters, self._world)
        self._own = self._shares[self._rank]
        self._velocity = [torch.zeros_like(parameter) for parameter in self._own]
        self._longest = max(sum(parameter.numel() for parameter in share) for share in self._shares)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update from `.grad`, which must already be the same on every process."""
        updates = []
        for parameter, velocity in zip(self._own, self._velocity, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            velocity.mul_(self._momentum).add_(gradient)
            updates.append(orthogonalize(gradient + self._momentum * velocity))
        for share, flat in zip(self._shares, self._exchange(updates), strict=True):
            for parameter, update in zip(share, flat.split([p.numel() for p in share]), strict=True):
                # With this factor an update moves the output by the same amount for wide and for tall matrices.
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-learning_rate * scale)

    def momentum(self) -> list[list[torch.Tensor]] | None:
        """The momentum of the matrices of each process, on the first one; None on others. Every process calls it."""
        if self._world == 1:
            return [self._velocity]
        gathered: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object(self._velocity, gathered)
        return gathered

    @torch.no_grad()
    def continue_from(self, momentum: list[list[torch.Tensor]]) -> None:
        """Take the momentum of this process. momentum: as the method of that name returned it."""
        for velocity, saved in zip(self._velocity, momentum[self._rank], strict=True):
            velocity.copy_(saved)

    def _exchange(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        """Exchange updates. Returns the flat updates of every share in order, without the padding of the exchange."""
        flat = torch.cat([update.flatten() for update in updates]) if updates else torch.zeros(0)
        if self._world == 1:
            return [flat]
        padded = torch.nn.functional.pad(flat, (0, self._longest - flat.numel()))
        gathered = [torch.empty(self._longest) for _ in range(self._world)]
        dist.all_gather(gathered, padded)
        sizes = [sum(parameter.numel() for parameter in share) for share in self._shares]
        return [whole[:size] for whole, size in zip(gathered, sizes, strict=True)]


def _share_out(parameters: list[nn.Parameter], world: int) -> list[list[nn.Parameter]]:
    """Divide the parameters into shares of about equal cost: the largest first, each to the cheapest share so far."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(world)]
    costs = [0] * world
    for parameter in sorted(parameters, key=_cost, reverse=True):
        lightest = costs.index(min(costs))
        shares[lightest].append(parameter)
        costs[lightest] += _cost(parameter)
    return shares


def _cost(parameter: nn.Parameter) -> int:
    return parameter.numel() * min(parameter.shape[-2:])
