"""Time the native mixture-of-experts layer and model against transformers, and against bounds, on one CPU thread.

    python benchmarks/moe.py [--json FILE] [--only NAME[,NAME]] [--seed N]

Each figure is a ratio of two things that are timed in turns in one run, so that a busy machine slows both alike. A
layer is timed in forward + backward on 4096 tokens of width 256. E is 16 or 128 experts: 256 or 32 tokens for each
expert.

  layer_speedup_E_{fp32,bf16}   time of transformers' Llama4TextMoe / time of ours, with the same weights
  dense_fraction_E_{fp32,bf16}  time of a dense layer with as many operations for each token / time of ours
  floor_fraction_{fp32,bf16}    time of the matrix products alone, at 256 tokens for each expert / time of ours
  memory_fraction_16            extra peak memory of forward + backward, ours / transformers'; also both in MiB
  step_speedup_16               a training step (loss, backward, AdamW) of a four-layer model with 16 experts:
                                transformers' time / ours, with the same weights
  quickstart_step_speedup       the same for the quick start's own model, which has 4 experts
  step_memory_fraction_16       extra peak memory of loss and backward of that four-layer model, ours / transformers';
                                also both in MiB
  ranks_speedup_2               tokens a second of two ranks that share the experts / of one rank; see moe_ranks.py
  gpu_*                         layers as wide as Scout's and Maverick's, and a step, if there is a GPU; see moe_gpu.py
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import Entry, main, peak_mib, ratio
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from posttrain.base.config import ModelSizes
from posttrain.base.model import build_model
from posttrain.base.tokenizer import build_tokenizer
from posttrain.model import NativeLlama4ForCausalLM
from posttrain.model.moe import GatedMLP, MoE

TOKENS, HIDDEN, WIDTH = 4096, 256, 256
TOKENS_AN_EXPERT = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], None]


def config(num_experts: int, **changes) -> Llama4TextConfig:
    settings: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "intermediate_size_mlp": 2 * WIDTH,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "num_local_experts": num_experts, "interleave_moe_layer_step": 2, "pad_token_id": 0,
    }  # fmt: skip
    return Llama4TextConfig(**settings | changes)


def layers(sizes: Llama4TextConfig, dtype: torch.dtype, device: str = "cpu") -> tuple[MoE, Llama4TextMoe]:
    """Our layer and transformers', with the same parameters. The router is spread so far that no expert is idle."""
    with torch.device(device):
        ours = MoE(sizes).to(dtype)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(0, sizes.hidden_size**-0.5)
    with torch.device("meta"):
        theirs = Llama4TextMoe(sizes)
    theirs.load_state_dict(dict(ours.named_parameters()), assign=True)
    return ours, theirs


def forward_backward(layer: torch.nn.Module, device: str = "cpu", hidden: int = HIDDEN) -> Run:
    dtype = next(layer.parameters()).dtype
    x_TD, grad_TD = (torch.randn(TOKENS, hidden, device=device, dtype=dtype) for _ in range(2))
    x_TD.requires_grad_()

    def run() -> None:
        layer.zero_grad()
        x_TD.grad = None
        out = layer(x_TD)
        (out[0] if isinstance(out, tuple) else out).backward(grad_TD)

    return run


def layer_speedup(num_experts: int, dtype: torch.dtype) -> float:
    ours, theirs = layers(config(num_experts), dtype)
    return ratio(forward_backward(theirs), forward_backward(ours), rounds=3 if num_experts > 16 else 7)


def dense_fraction(num_experts: int, dtype: torch.dtype) -> float:
    """The figure for a dense layer, which is as wide as the shared expert and the one chosen expert together."""
    ours, _ = layers(config(num_experts), dtype)
    dense = GatedMLP(config(num_experts), 2 * WIDTH).to(dtype)
    return ratio(forward_backward(dense), forward_backward(ours), rounds=11)


def bare_products(dtype: torch.dtype) -> Run:
    """Only the matrix products of routed experts and shared expert, for forward and both gradients."""
    products = []
    for rows in (*[TOKENS_AN_EXPERT] * (TOKENS // TOKENS_AN_EXPERT), TOKENS):
        for inner, outer in ((HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN)):
            shapes = ((rows, inner), (inner, outer), (rows, outer))
            products.append([torch.randn(shape, dtype=dtype) for shape in shapes])

    def run() -> None:
        for x, weight, grad in products:
            _ = x @ weight
            _ = grad @ weight.T
            _ = x.T @ grad

    return run


def floor_fraction(dtype: torch.dtype) -> float:
    ours, _ = layers(config(TOKENS // TOKENS_AN_EXPERT), dtype)
    return ratio(bare_products(dtype), forward_backward(ours), rounds=11)


def memory_fraction(ours: Run, theirs: Run, clear: Run, *, device: str = "cpu") -> tuple[float, dict[str, float]]:
    """Extra peak memory, ours / transformers', and both in MiB. clear: drops gradients, so that they count too."""
    peaks = [peak_mib(lambda run=run: (run(), clear())[1], device) for run in (ours, theirs)]
    return peaks[0] / peaks[1], {"ours_mib": peaks[0], "transformers_mib": peaks[1]}


def layer_memory() -> tuple[float, dict[str, float]]:
    ours, theirs = layers(config(16), torch.float32)
    return memory_fraction(forward_backward(ours), forward_backward(theirs), ours.zero_grad)


Models = tuple[NativeLlama4ForCausalLM, Llama4ForCausalLM]


def models() -> Models:
    return beside_theirs(NativeLlama4ForCausalLM(config(16)))


def quickstart_models() -> Models:
    """The quick start's model, with 4 experts and under a million parameters."""
    return beside_theirs(build_model(ModelSizes(), build_tokenizer(), 0.0, seed=0))


def beside_theirs(ours: NativeLlama4ForCausalLM) -> Models:
    theirs = Llama4ForCausalLM(ours.config)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def loss_backward(model: torch.nn.Module, ids: torch.Tensor | None = None) -> Run:
    """One loss of these token ids and its backward; without ids, of 16 random rows of 128."""
    ids = torch.randint(1, 200, (16, 128)) if ids is None else ids

    def run() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def step_speedup(made: Models) -> float:
    def step(model: torch.nn.Module) -> Run:
        backward = loss_backward(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        return lambda: (backward(), optimizer.step())[0]

    ours, theirs = made
    return ratio(step(theirs), step(ours), rounds=5)


def step_memory() -> tuple[float, dict[str, float]]:
    ours, theirs = models()
    return memory_fraction(
        loss_backward(ours), loss_backward(theirs), lambda: (ours.zero_grad(), theirs.zero_grad())[0]
    )


GOALS = {
    "layer_speedup_16_fp32": ">= 10", "layer_speedup_16_bf16": ">= 10",
    "layer_speedup_128_fp32": ">= 40", "layer_speedup_128_bf16": ">= 25", "floor_fraction_fp32": ">= 0.5",
}  # fmt: skip


def entries() -> dict[str, Entry]:
    table = {}
    for name, measure in (("layer_speedup", layer_speedup), ("dense_fraction", dense_fraction)):
        for num_experts in (16, 128):
            for dtype, kind in DTYPES.items():
                entry = f"{name}_{num_experts}_{dtype}"
                table[entry] = Entry(lambda m=measure, n=num_experts, d=kind: m(n, d), GOALS.get(entry))
    for dtype, kind in DTYPES.items():
        entry = f"floor_fraction_{dtype}"
        table[entry] = Entry(lambda d=kind: floor_fraction(d), GOALS.get(entry))
    from moe_ranks import ranks_speedup

    table |= {
        "memory_fraction_16": Entry(layer_memory, "<= 0.15"),
        "step_speedup_16": Entry(lambda: step_speedup(models()), ">= 3"),
        "quickstart_step_speedup": Entry(lambda: step_speedup(quickstart_models())),
        "step_memory_fraction_16": Entry(step_memory),
        "ranks_speedup_2": Entry(ranks_speedup),
    }
    if torch.cuda.is_available():
        from moe_gpu import gpu_entries

        table |= gpu_entries()
    return table


if __name__ == "__main__":
    main(__doc__, entries())
