"""AdamW that keeps fp32 master weights of bf16 parameters.

A bf16 weight has 8 bits of mantissa: an update smaller than 1/256 of it is rounded away, which is most of them at the
learning rates of fine-tuning. The sum is kept in fp32 and rounded into the parameter after each step.
Left out: fused kernels (parameters that are fp32 already should use torch's own AdamW).
"""

from collections.abc import Callable
from typing import Any

import torch


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; moments and master weights are fp32 whatever the parameters are.

    Source: Loshchilov and Hutter 2019, algorithm 2, with the bias corrections of Kingma and Ba 2015.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["master"] = param.detach().float().clone()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        beta1, beta2 = group["betas"]
        grad = param.grad.float()  # type: ignore[union-attr]
        state["step"] += 1
        steps = state["step"].item()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        state["master"].mul_(1 - group["lr"] * group["weight_decay"])
        state["master"].addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**steps))
        param.copy_(state["master"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; torch alone would round it to the type of the parameters."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, saved in state_dict["state"].items():
            param = params[index]
            self.state[param] = {
                name: value.clone() if name == "step" else value.to(param.device, torch.float32, copy=True)
                for name, value in saved.items()
            }
