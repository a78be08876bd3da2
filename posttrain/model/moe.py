"""Feed-forward layers: dense, and the mixture of experts with a shared expert.

Routing is dropless: tokens are sorted by expert, and each expert multiplies its own run of rows. So experts have no
capacity limit, no token is dropped, and no expert computes for tokens of another. Left out: expert parallelism (for
that, DeepSpeed replaces the layer; see expert_parallel.py).

Shapes: T tokens, D hidden, I expert width, E experts, K experts of each token, N = T * K rows, one for each token and
expert that it chose.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Llama4TextConfig
from transformers.activations import ACT2FN


class _Gated(torch.autograd.Function):
    """act(gate) * up. Backward computes act(gate) again instead of keeping it from forward to backward.

    Without this class autograd would keep gate, up and act(gate).
    """

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return grad_gate, grad * activated.detach(), None


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: Llama4TextConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x), self.act_fn))


class Router(nn.Linear):
    """A linear layer with one logit for each expert, computed in fp32 (fp64 for a model in fp64)."""

    def __init__(self, config: Llama4TextConfig):
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """The weights of all experts: gate_up_proj [E, D, 2 I], in which the gate comes first, and down_proj [E, I, D].

    Both are applied as x @ W, so the input is on the second axis, unlike in `nn.Linear`. As for the experts of
    transformers, peft is not told so (`is_transposed`): adapters have A on the last axis, and fit both.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, hidden, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_ND: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Apply expert e to rows ends_E[e - 1] to ends_E[e], the latter excluded. An expert may have no rows.

        ends_E: int32. Returns [N, D].
        """
        gate, up = _grouped_mm(x_ND, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        return _grouped_mm(_Gated.apply(gate, up, self.act_fn), self.down_proj, ends_E)


def _grouped_mm(x_ND: torch.Tensor, weight_EDO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The rows of expert e times its weight, for all experts: [N, O].

    The grouped kernel needs rows that are a multiple of 16 bytes long. Other widths are multiplied expert by expert.
    """
    if not any(size * x_ND.element_size() % 16 for size in weight_EDO.shape[1:]):
        return F.grouped_mm(x_ND, weight_EDO, offs=ends_E)
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    # unbind and not weight[e], because the backward of each index would make a gradient of the size of all experts.
    return torch.cat([rows @ weight for rows, weight in zip(x_ND.split(counts), weight_EDO.unbind(0), strict=True)])


class _Dispatch(torch.autograd.Function):
    """rows[n] = x[order[n] // K]: one row for each choice of a token, sorted by expert.

    Backward gathers through the inverse order. Autograd would use a scatter that accumulates, which is slower.
    """

    @staticmethod
    def forward(ctx, x_TD: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.k = k
        return x_TD.index_select(0, order_N if k == 1 else order_N // k)

    @staticmethod
    def backward(ctx, grad_ND: torch.Tensor):
        (inverse_N,) = ctx.saved_tensors
        grad = grad_ND.index_select(0, inverse_N)
        return (grad if ctx.k == 1 else grad.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


class _Combine(torch.autograd.Function):
    """out[t] = sum over k of rows[inverse[t * K + k]]: adds the K rows of each token. The transpose of _Dispatch."""

    @staticmethod
    def forward(ctx, rows_ND: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order_N)
        ctx.k = k
        rows = rows_ND.index_select(0, inverse_N)
        return rows if k == 1 else rows.unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx, grad_TD: torch.Tensor):
        (order_N,) = ctx.saved_tensors
        return grad_TD.index_select(0, order_N if ctx.k == 1 else order_N // ctx.k), None, None, None


class _Scale(torch.autograd.Function):
    """rows_ND * scores_N1. Backward sums the gradient of a score in fp32 even if the rows are bf16."""

    @staticmethod
    def forward(ctx, rows_ND: torch.Tensor, scores_N1: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_ND, scores_N1)
        return rows_ND * scores_N1

    @staticmethod
    def backward(ctx, grad_ND: torch.Tensor):
        rows_ND, scores_N1 = ctx.saved_tensors
        dtype = torch.promote_types(grad_ND.dtype, torch.float32)
        grad_N1 = (grad_ND.to(dtype) * rows_ND.to(dtype)).sum(-1, keepdim=True).to(scores_N1.dtype)
        return grad_ND * scores_N1, grad_N1


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing of one layer in one forward: `logits_TE` in fp32, with its graph, and `expert_ids_TK`, int64."""

    logits_TE: torch.Tensor
    expert_ids_TK: torch.Tensor


def choose_experts(logits_TE: torch.Tensor, top_k: int, choice_bias_E: torch.Tensor | None) -> torch.Tensor:
    """The K experts with the largest logits of each token, int64 [T, K], best first.

    choice_bias_E: added to the logits for the choice alone; the scores of the chosen experts are computed without it.
    """
    wanted_TE = logits_TE if choice_bias_E is None else logits_TE + choice_bias_E
    return wanted_TE.topk(top_k, dim=-1).indices


class MoE(nn.Module):
    """A shared expert plus the top-K routed experts. Returns a plain tensor, as DeepSpeed's replacement does.

    recorder: while it is a list, each call appends its `Routing`; the model sets it during a forward. choice_bias_E:
    fp32 or None, see `choose_experts`. It is not a weight, and is never saved.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.experts = Experts(config)
        self.router = Router(config)
        self.shared_expert = GatedMLP(config, config.intermediate_size)
        self.recorder: list[Routing] | None = None
        self.choice_bias_E: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, expert_ids: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., D] -> [..., D]. expert_ids [..., K]: replay this choice; scores still have their gradient."""
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.router(x_TD)
        if expert_ids is None:
            ids_TK = choose_experts(logits_TE, self.top_k, self.choice_bias_E)
        else:
            ids_TK = expert_ids.reshape(-1, self.top_k)
        chosen_TK = logits_TE.gather(-1, ids_TK)
        if self.recorder is not None:
            self.recorder.append(Routing(logits_TE, ids_TK))
        # Routed experts come first, as under expert parallelism. So backward adds the gradients of x in the same order
        # in both, and rounds them in the same way.
        routed_TD = self._routed(x_TD, chosen_TK, ids_TK)
        return routed_TD.view(x.shape) + self.shared_expert(x)

    def _routed(self, x_TD: torch.Tensor, chosen_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        flat_N = ids_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x_TD.device))
        ends_E = torch.bincount(flat_N, minlength=self.num_experts).cumsum(0).to(torch.int32)
        # Each score is a sigmoid of its own logit, not normalised over experts, and scales the expert's input.
        scores_N1 = torch.sigmoid(chosen_TK).to(x_TD.dtype).view(-1, 1)
        if self.top_k == 1:
            rows_ND = _Dispatch.apply(_Scale.apply(x_TD, scores_N1), order_N, inverse_N, 1)
        else:
            rows_ND = _Scale.apply(_Dispatch.apply(x_TD, order_N, inverse_N, self.top_k), scores_N1[order_N])
        return _Combine.apply(self.experts(rows_ND, ends_E), order_N, inverse_N, self.top_k)
