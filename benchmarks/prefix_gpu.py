"""Figures of rl_prefix.py for a GPU: groups whose prompt is run once, beside a padded row for each rollout.

The model has 4 layers of 16 experts, hidden 2048, and 128 channels a head. Both layouts get the same rollouts, in
micro-batches of at most 65,536 tokens.

  prefix_speedup_DTYPE  seconds of forward and backward of `TokenPolicy` on padded rows / on packed trees, in turns: the
                        geometric mean over the shapes (tokens of the prompt, of a reply in the mean, replies of a
                        group). Beside it each shape, with the tokens that are run, the peak memory of a step beyond
                        that before it, the milliseconds of a step and those of them in which the tensors of its rows
                        are made. Prompts of more than the limit in posttrain/model/tree_attention.py go through
                        FlexAttention
  prefix_way_DTYPE      seconds with copied keys (TreeKeys) / with FlexAttention (TreeFlex), on trees of 16,384 tokens
                        or somewhat fewer: the longest prompt up to which copied keys are faster. Beside it the ratio at
                        each prompt, with 8 replies of 64 tokens, and the milliseconds in which masks and indices of
                        either way are made, for one kind of layer
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from measure import LIBRARIES, Entry, main, peak_mib, ratio, seconds
from moe_gpu import model_config
from rl_prefix import rollouts, step

from posttrain.model import NativeLlama4ForCausalLM, tree_attention
from posttrain.model.tree_attention import TreeFlex, TreeKeys
from posttrain.rl.training.batches import collate
from posttrain.rl.training.policy import PAD_ID, TokenPolicy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Tokens of a prompt, tokens of a reply, replies of a group: groups of a step. Padded, about 50,000 tokens each.
SHAPES = {(27, 15, 8): 96, (64, 64, 8): 40, (512, 128, 8): 9, (1024, 256, 8): 4, (4096, 1024, 8): 1}
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
WAYS = {"keys": math.inf, "flex": -1}  # of tree_attention._SHORT_PATH
MAX_TOKENS, TREE = 65_536, 16_384
LAYERS, REPLY, REPLIES = 4, 64, 8
ROUNDS = 3


def policy(dtype: torch.dtype) -> TokenPolicy:
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model: Any = NativeLlama4ForCausalLM(model_config(LAYERS))
    return TokenPolicy(model.to(dtype).train(), 1.0)


def best_ms(run: Callable[[], object]) -> float:
    return 1e3 * min(seconds(run) for _ in range(2))


def run_tokens(samples: Any, *, shared: bool) -> int:
    return collate(samples, PAD_ID, "cpu", shared=shared).input_ids_BS.numel()


def speedup(name: str) -> tuple[float, dict[str, Any]]:
    made = policy(DTYPES[name])
    found: dict[str, Any] = {}
    for shape, groups in SHAPES.items():
        label = "_".join(map(str, shape))
        samples = rollouts(shape, groups)
        runs = {}
        for layout, shared in (("padded", False), ("shared", True)):
            run = step(made, samples, shared=shared, max_tokens=MAX_TOKENS, device="cuda")
            found[f"{label}_{layout}_tokens"] = run_tokens(samples, shared=shared)
            found[f"{label}_{layout}_mib"] = peak_mib(run, "cuda")  # these calls warm up, too
            found[f"{label}_{layout}_ms"] = best_ms(run)
            found[f"{label}_{layout}_rows_ms"] = best_ms(partial(collate, samples, PAD_ID, "cuda", shared=shared))
            runs[layout] = run
        found[label] = ratio(runs["padded"], runs["shared"], ROUNDS, inner=1)
    figures = [found["_".join(map(str, shape))] for shape in SHAPES]
    return math.prod(figures) ** (1 / len(figures)), found


def ways(name: str) -> tuple[float, dict[str, Any]]:
    made = policy(DTYPES[name])
    found: dict[str, Any] = {}
    for prompt in PROMPTS:
        samples = rollouts((prompt, REPLY, REPLIES), max(1, TREE // (prompt + REPLIES * REPLY)))
        run = step(made, samples, shared=True, max_tokens=MAX_TOKENS, device="cuda")

        def by(way: str, run: Any = run) -> None:
            with mock.patch.object(tree_attention, "_SHORT_PATH", WAYS[way]):
                run()

        found[f"{prompt}"] = ratio(lambda by=by: by("keys"), lambda by=by: by("flex"), ROUNDS)
        tree: Any = collate(samples, PAD_ID, "cuda", shared=True).tree
        makers = {
            "keys": lambda tree=tree: TreeKeys.of(tree.nodes, torch.device("cuda")),
            "flex": lambda tree=tree: TreeFlex.of(tree, None),
        }
        found |= {f"{prompt}_{way}_ms": best_ms(make) for way, make in makers.items()}
    return max((prompt for prompt in PROMPTS if found[f"{prompt}"] <= 1), default=0), found


ENTRIES = {
    f"{kind}_{name}": Entry(lambda n=name, m=measure: m(n))
    for name in DTYPES
    for kind, measure in (("prefix_speedup", speedup), ("prefix_way", ways))
}

if __name__ == "__main__":
    main(__doc__, ENTRIES, (*LIBRARIES, "triton"))
