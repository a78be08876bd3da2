"""The native mixture-of-experts layer beside transformers' own, in one process on one thread.

    python benchmarks/moe.py [--json FILE] [--only NAME[,NAME]] [--seed N]

Each entry is a ratio of two things timed in turns within this run, so that a busy machine slows both alike:

  layer_speedup_{16,128}_{fp32,bf16}  transformers' Llama4TextMoe over ours, forward + backward, 4096 tokens, hidden 256
  step_speedup_16                     a training step (loss, backward, AdamW) of a four-layer model with 16 experts
  floor_fraction_fp32                 the bare matrix products that the layer cannot do without, over the layer
  memory_ratio_16                     extra peak memory of forward + backward, transformers' layer over ours
  gpu_*                               the same on a GPU where there is one, in bf16; gpu_mfu is the fraction of its
                                      dense bf16 peak that our layer's matrix products reach

Left out: expert parallelism, and models too large for one machine.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from posttrain.model import NativeLlama4ForCausalLM
from posttrain.model.moe import MoE

TOKENS, HIDDEN, WIDTH = 4096, 256, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Dense bf16 peaks of the makers' data sheets, in FLOP/s.
GPU_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def config(num_experts: int, **changes) -> Llama4TextConfig:
    settings = {
        "vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "intermediate_size_mlp": 2 * WIDTH,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "num_local_experts": num_experts, "interleave_moe_layer_step": 2, "pad_token_id": 0,
    }  # fmt: skip
    return Llama4TextConfig(**settings | changes)


def layers(num_experts: int, dtype: torch.dtype, device: str) -> tuple[MoE, Llama4TextMoe]:
    """Ours and theirs with the same weights; a router spread enough that no expert is idle."""
    ours = MoE(config(num_experts))
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(0, HIDDEN**-0.5)
    theirs = Llama4TextMoe(config(num_experts))
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


def forward_backward(layer: torch.nn.Module, x_TD: torch.Tensor) -> Callable[[], None]:
    grad = torch.randn_like(x_TD)

    def run() -> None:
        layer.zero_grad()
        out = layer(x_TD)
        (out[0] if isinstance(out, tuple) else out).backward(grad)
        if x_TD.is_cuda:
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(peer: Callable[[], None], ours: Callable[[], None], rounds: int, inner: int = 1) -> float:
    """Median over rounds of peer's time over ours; each round times both, ours as the best of `inner` calls."""
    peer()
    ours()
    return statistics.median(seconds(peer) / min(seconds(ours) for _ in range(inner)) for _ in range(rounds))


def inputs(device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)


def layer_speedup(num_experts: int, dtype: torch.dtype, device: str = "cpu") -> float:
    ours, theirs = layers(num_experts, dtype, device)
    x_TD = inputs(device, dtype)
    rounds = 3 if num_experts > 16 and device == "cpu" else 7
    return ratio(forward_backward(theirs, x_TD), forward_backward(ours, x_TD), rounds, inner=2)


def step_speedup(device: str = "cpu") -> float:
    ours = NativeLlama4ForCausalLM(config(16)).to(device).train()
    theirs = Llama4ForCausalLM(config(16)).to(device).train()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(1, 512, (16, 128), device=device)

    def step(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def run() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return ratio(step(theirs), step(ours), rounds=5)


def bare_products(device: str, dtype: torch.dtype) -> Callable[[], None]:
    """The products of one routed and the shared expert, forward and both gradients, for every token; nothing else."""
    up = torch.randn(HIDDEN, 2 * WIDTH, device=device, dtype=dtype)
    down = torch.randn(WIDTH, HIDDEN, device=device, dtype=dtype)
    x_TD, wide = (torch.randn(TOKENS, size, device=device, dtype=dtype) for size in (HIDDEN, 2 * WIDTH))
    narrow = wide[:, :WIDTH].contiguous()

    def run() -> None:
        for _ in range(2):
            for left, right in ((x_TD, up), (narrow, down)):
                out = left @ right
                _ = out @ right.T
                _ = left.T @ out
        if x_TD.is_cuda:
            torch.cuda.synchronize()

    return run


def floor_fraction() -> float:
    ours, _ = layers(16, torch.float32, "cpu")
    run = forward_backward(ours, inputs("cpu", torch.float32))
    return ratio(bare_products("cpu", torch.float32), run, rounds=11)


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """Most memory in use during `run` above what was in use before it."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # hand back what the first run freed, or it would hide the second
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def memory_ratio(device: str = "cpu") -> float:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ours, theirs = layers(16, dtype, device)
    x_TD = inputs(device, dtype)
    extra = []
    for layer in (theirs, ours):
        run = forward_backward(layer, x_TD)
        extra.append(peak_bytes(run, device))
        layer.zero_grad()
    return extra[0] / extra[1]


def gpu_mfu() -> float:
    """Our layer's floating-point operations a second over the card's dense bf16 peak."""
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in GPU_PEAKS.items() if key in name), None)
    if peak is None:
        raise SystemExit(f"gpu_mfu: no peak known for {name!r}; add it to GPU_PEAKS")
    ours, _ = layers(16, torch.bfloat16, "cuda")
    run = forward_backward(ours, inputs("cuda", torch.bfloat16))
    run()
    flops = 2 * 3 * 2 * TOKENS * (HIDDEN * 2 * WIDTH + WIDTH * HIDDEN)
    return flops / statistics.median(seconds(run) for _ in range(20)) / peak


def entries() -> dict[str, Callable[[], float]]:
    table: dict[str, Callable[[], float]] = {
        f"layer_speedup_{num_experts}_{name}": lambda n=num_experts, d=dtype: layer_speedup(n, d)
        for num_experts in (16, 128)
        for name, dtype in DTYPES.items()
    }
    table |= {
        "step_speedup_16": step_speedup,
        "floor_fraction_fp32": floor_fraction,
        "memory_ratio_16": memory_ratio,
    }
    if torch.cuda.is_available():
        for num_experts in (16, 128):
            table[f"gpu_layer_speedup_{num_experts}_bf16"] = lambda n=num_experts: layer_speedup(
                n, torch.bfloat16, "cuda"
            )
        table |= {
            "gpu_step_speedup_16": lambda: step_speedup("cuda"),
            "gpu_memory_ratio_16": lambda: memory_ratio("cuda"),
            "gpu_mfu": gpu_mfu,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--only", default="", help="entries to run, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = entries()
    chosen = [name for name in arguments.only.split(",") if name] or list(table)
    if unknown := [name for name in chosen if name not in table]:
        parser.error(f"--only: no entry {', '.join(unknown)}; there are: {', '.join(table)}")
    torch.set_num_threads(1)
    results = {}
    for name in chosen:
        torch.manual_seed(arguments.seed)
        results[name] = round(table[name](), 3)
        print(f"{name:28} {results[name]:10.3f}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
