"""Figures of moe.py for a GPU: a bf16 layer as wide as Scout's (16 experts) and Maverick's (128, or as many as fit).

For each of the two, forward + backward of 4096 tokens, hidden 5120, experts of width 8192:

  gpu_speedup_NAME           time of transformers' layer / time of ours, with the same weights
  gpu_grouped_fraction_NAME  time of the products of routed experts alone, by torch.nn.functional.grouped_mm / time of
  ours gpu_mfu_NAME               floating-point operations a second of our layer / of a large matrix product that is
  measured
                             in the same run (and not taken from a data sheet)
  gpu_memory_fraction_NAME   extra peak memory, ours / transformers'
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Entry, ratio, seconds
from moe import TOKENS, Run, config, forward_backward, layers, memory_fraction

HIDDEN, WIDTH = 5120, 8192
EXPERTS = {"scout": 16, "maverick": 128}
SQUARE = 8192  # side of the matrices whose product is the reference for gpu_mfu
BF16 = torch.bfloat16


def fitting(num_experts: int) -> int:
    """The number of experts, halved until the layer fits into the free memory."""
    # Memory: weight and gradient, and what transformers keeps for every token in every expert (input, gate, up,
    # product).
    each = 2 * (2 * 3 * HIDDEN * WIDTH + 2 * TOKENS * (2 * HIDDEN + 4 * WIDTH))
    while num_experts > 1 and num_experts * each > 0.9 * torch.cuda.mem_get_info()[0]:
        num_experts //= 2
    return num_experts


def pair(name: str):
    """Our layer, transformers' layer, and the number of their experts."""
    torch.cuda.empty_cache()
    num_experts = fitting(EXPERTS[name])
    sizes = config(num_experts, hidden_size=HIDDEN, intermediate_size=WIDTH)
    return *layers(sizes, BF16, "cuda"), num_experts


def timed(layer: torch.nn.Module) -> Run:
    return forward_backward(layer, "cuda", HIDDEN)


def speedup(name: str) -> tuple[float, dict[str, float]]:
    ours, theirs, num_experts = pair(name)
    return ratio(timed(theirs), timed(ours), 7), {"experts": num_experts}


def grouped_fraction(name: str) -> tuple[float, dict[str, float]]:
    ours, _, num_experts = pair(name)
    ends = torch.arange(1, num_experts + 1, device="cuda", dtype=torch.int32) * (TOKENS // num_experts)
    rows = [torch.randn(TOKENS, size, device="cuda", dtype=BF16, requires_grad=True) for size in (HIDDEN, WIDTH)]
    weights = [ours.experts.gate_up_proj, ours.experts.down_proj]
    grads = [torch.randn(TOKENS, size, device="cuda", dtype=BF16) for size in (2 * WIDTH, HIDDEN)]

    def alone() -> None:
        ours.zero_grad()
        for x, weight, grad in zip(rows, weights, grads, strict=True):
            x.grad = None
            F.grouped_mm(x, weight, offs=ends).backward(grad)

    return ratio(alone, timed(ours), 11), {"experts": num_experts}


def mfu(name: str) -> tuple[float, dict[str, float]]:
    ours, _, num_experts = pair(name)
    left, right = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=BF16) for _ in range(2))
    layer, product = timed(ours), lambda: left @ right
    seconds(layer), seconds(product)
    # Forward and both gradients, of a routed expert and the shared one.
    layer_flops = 3 * 2 * TOKENS * 2 * 3 * HIDDEN * WIDTH
    rounds = [(seconds(layer), min(seconds(product) for _ in range(5))) for _ in range(15)]
    fraction = statistics.median(layer_flops / a / (2 * SQUARE**3 / b) for a, b in rounds)
    rate = 2 * SQUARE**3 / statistics.median(b for _, b in rounds)
    return fraction, {"experts": num_experts, "measured_tflops": rate / 1e12}


def memory(name: str) -> tuple[float, dict[str, float]]:
    ours, theirs, num_experts = pair(name)
    fraction, peaks = memory_fraction(timed(ours), timed(theirs), ours.zero_grad, device="cuda")
    return fraction, {"experts": num_experts, **peaks}


def gpu_entries() -> dict[str, Entry]:
    """The entries of both widths, by name."""
    kinds: dict[str, Callable] = {
        "speedup": speedup, "grouped_fraction": grouped_fraction, "mfu": mfu, "memory_fraction": memory
    }  # fmt: skip
    return {
        f"gpu_{kind}_{name}": Entry(lambda m=measure, n=name: m(n))
        for name in EXPERTS
        for kind, measure in kinds.items()
    }
