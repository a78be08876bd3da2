"""Figures of moe.py for a GPU: layers as wide as Scout's and Maverick's, and a whole training step, in bf16.

A layer is timed in forward + backward of 4096 tokens, hidden 5120, experts of width 8192: 16 experts as in Scout, and
128 as in Maverick, or as many as fit.

  gpu_speedup_NAME           time of transformers' layer / time of ours, with the same weights
  gpu_grouped_fraction_NAME  time of the products of routed experts alone, by torch.nn.functional.grouped_mm / time of
                             ours
  gpu_mfu_NAME               floating-point operations a second of our layer / of a large matrix product, which is
                             measured in the same run (and not taken from a data sheet)
  gpu_memory_fraction_NAME   extra peak memory, ours / transformers'

A model of 2.5 billion parameters has 6 layers of 16 experts, hidden 2048, width 4096, and takes 4096 tokens a step:

  gpu_step_speedup           a training step (loss, backward, AdamW): transformers' time / ours, with the same weights
  gpu_step_memory_fraction   extra peak memory of loss and backward, ours / transformers'
  gpu_plan_MODE              what `posttrain plan` computes for activations and loss / the measured peak beside weights
                             and gradients, for gradient checkpointing MODE
"""

import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from measure import Entry, peak_mib, ratio, seconds
from moe import TOKENS, Models, Run, beside_theirs, config, forward_backward, layers, loss_backward, memory_fraction
from transformers import Llama4TextConfig

from posttrain.config.training import GradientCheckpointing
from posttrain.model import NativeLlama4ForCausalLM
from posttrain.model.recompute import checkpointing_arguments
from posttrain.planning.activations import peak_bytes

HIDDEN, WIDTH = 5120, 8192
EXPERTS = {"scout": 16, "maverick": 128}
SQUARE = 8192  # side of the matrices whose product is the reference for gpu_mfu
BF16 = torch.bfloat16
ROWS, LENGTH = 2, 2048  # of a training step


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
    for run in (layer, product):
        seconds(run)  # warm up
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


def model_config(layers: int = 6) -> Llama4TextConfig:
    return config(
        16, vocab_size=32768, hidden_size=2048, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, interleave_moe_layer_step=1,
    )  # fmt: skip


def ours_alone() -> NativeLlama4ForCausalLM:
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model: Any = NativeLlama4ForCausalLM(model_config())
        return model.to(BF16).train()


def both() -> Models:
    with torch.device("cuda"):
        ours, theirs = beside_theirs(ours_alone())
    return ours, cast(Any, theirs).to(BF16)


def backward(model: torch.nn.Module) -> Run:
    return loss_backward(model, torch.randint(1, 200, (ROWS, LENGTH), device="cuda"))


def step_speedup() -> tuple[float, dict[str, float]]:
    def step(model: torch.nn.Module) -> Run:
        run = backward(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        return lambda: (run(), optimizer.step())[0]

    ours, theirs = (step(model) for model in both())
    figure = ratio(theirs, ours, rounds=5)
    best = min(seconds(ours) for _ in range(3))
    return figure, {"tokens_per_second": ROWS * LENGTH / best}


def step_memory() -> tuple[float, dict[str, float]]:
    ours, theirs = both()
    return memory_fraction(
        backward(ours), backward(theirs), lambda: (ours.zero_grad(), theirs.zero_grad())[0], device="cuda"
    )


def planned(mode: GradientCheckpointing) -> tuple[float, dict[str, float]]:
    model = ours_alone()
    if mode != "none":
        model.gradient_checkpointing_enable(checkpointing_arguments(mode))
    backward(model)()
    ids = torch.randint(1, 200, (ROWS, LENGTH), device="cuda")
    # The gradients of before stay where they are, so that what is measured is beside weights and gradients.
    measured = peak_mib(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward(), "cuda")
    plan = peak_bytes(model.config, ROWS * LENGTH, "bfloat16", checkpointing=mode) / 2**20
    return plan / measured, {"planned_mib": plan, "measured_mib": measured}


def gpu_entries() -> dict[str, Entry]:
    """The entries of both widths, by name."""
    kinds: dict[str, Callable] = {
        "speedup": speedup, "grouped_fraction": grouped_fraction, "mfu": mfu, "memory_fraction": memory
    }  # fmt: skip
    table = {
        f"gpu_{kind}_{name}": Entry(lambda m=measure, n=name: m(n))
        for name in EXPERTS
        for kind, measure in kinds.items()
    }
    table |= {"gpu_step_speedup": Entry(step_speedup), "gpu_step_memory_fraction": Entry(step_memory)}
    modes: tuple[GradientCheckpointing, ...] = ("none", "selective", "full")
    return table | {f"gpu_plan_{mode}": Entry(lambda m=mode: planned(m)) for mode in modes}
