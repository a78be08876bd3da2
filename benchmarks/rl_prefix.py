"""Figures of rl.py for training on groups whose prompt is run once, beside a padded row for each rollout.

shared_prefix_speedup   seconds of forward and backward of `TokenPolicy` on padded rows / on packed trees, in turns in
                        one process; the geometric mean over four shapes at hidden width 512. A shape is (tokens of the
                        prompt, of a reply in the mean, replies of a group). Replies have half to one and a half times
                        the mean, prompts 0.8 to 1.2 times. Both get the same rollouts and micro-batches of as many
                        tokens, the trainer's default. Beside it: each shape, also at hidden width 96, there also with
                        each of the two ways of attention on a CPU instead of the one that the trainer chooses; and
                        the peak memory of a step beyond that before it
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from measure import peak_mib, ratio, seconds
from rl_models import build

from posttrain.model import tree_attention
from posttrain.rl.training.batches import collate, micro_batches
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.policy import PAD_ID, TokenPolicy
from posttrain.rl.training.samples import TrainSample

# Tokens of a prompt, tokens of a reply, replies of a group: groups of a step.
SHAPES = {(27, 15, 8): 8, (64, 64, 8): 2, (512, 128, 8): 1, (1024, 256, 8): 1}
WAYS = {"keys": math.inf, "blocks": -1}  # of tree_attention._SHORT_PATH
CHUNK = 8192  # of attention, as Llama 4 has it
ROUNDS = 2
VOCABULARY = 300


def rollouts(shape: tuple[int, int, int], groups: int, seed: int = 0) -> list[TrainSample]:
    """Groups of random tokens. Lengths and tokens depend on the seed alone."""
    prompt_tokens, reply_tokens, replies = shape
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    samples = []
    for _ in range(groups):
        prompt = tokens(draw.randint(int(prompt_tokens * 0.8), int(prompt_tokens * 1.2)))
        for _ in range(replies):
            ids = prompt + tokens(draw.randint(reply_tokens // 2, reply_tokens * 3 // 2))
            count = len(ids) - len(prompt)
            samples.append(
                TrainSample(ids, ((len(prompt), len(ids)),), (-1.0,) * count, (0,) * count, draw.gauss(0, 1))
            )
    return samples


def step(
    policy: TokenPolicy,
    samples: Sequence[TrainSample],
    *,
    shared: bool,
    max_tokens: int = TrainingConfig.model_fields["micro_batch_tokens"].default,
    device: str = "cpu",
) -> Callable[[], None]:
    """Forward and backward of all micro-batches, making their tensors included."""

    def run() -> None:
        policy.zero_grad(set_to_none=False)
        for chunk in micro_batches(samples, max_tokens, shared=shared):
            batch = collate(chunk, PAD_ID, device, shared=shared)
            logprobs_T, _, _ = policy(batch)
            (logprobs_T * batch.advantages_T).sum().backward()

    return run


def shared_prefix_speedup() -> tuple[float, dict[str, Any]]:
    found: dict[str, Any] = {}
    for size, width in (("1m", 96), ("50m", 512)):
        model = build(size).train()
        model.model.config.attention_chunk_size = CHUNK
        policy = TokenPolicy(model, 1.0)
        for shape, groups in SHAPES.items():
            name = f"h{width}_" + "_".join(map(str, shape))
            samples = rollouts(shape, groups)
            padded, shared = step(policy, samples, shared=False), step(policy, samples, shared=True)
            found[f"{name}_padded_mib"] = peak_mib(padded, "cpu")  # these calls warm up, too
            found[f"{name}_shared_mib"] = peak_mib(shared, "cpu")
            found[name] = statistics.median(seconds(padded) / seconds(shared) for _ in range(ROUNDS))
            if size == "1m":
                for way, limit in WAYS.items():
                    with mock.patch.object(tree_attention, "_SHORT_PATH", limit):
                        found[f"{name}_{way}"] = ratio(padded, shared, ROUNDS, inner=1)
    figures = [found["h512_" + "_".join(map(str, shape))] for shape in SHAPES]
    return math.prod(figures) ** (1 / len(figures)), found
