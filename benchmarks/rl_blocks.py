"""Figure of rl.py for the size of the blocks in which an engine on a CPU shares the cache of a prompt.

engine_block_speedup    tokens a CPU second of an engine with our blocks of 32 tokens / with 128, vLLM's default on a
                        CPU, in turns: 8 replies of 40 tokens to each of 32 new prompts of 100 tokens. Only full blocks
                        are shared, so with 128 every reply computes its prompt. Beside it the same for prompts of 24
                        tokens, which fill no block of either
"""

import random
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from rl_models import save, start_engine

from posttrain.config.engines import EngineConfig
from posttrain.pipeline.ray_session import ray_session
from posttrain.sampling.requests import SampleRequest

VLLM_DEFAULT = 128
PROMPTS, REPLIES, REPLY_TOKENS, ROUNDS = 32, 8, 40, 5
LENGTHS = (100, 24)


def cpu_seconds(pids: Iterable[int]) -> float:
    """The processor time that these processes have taken. Other programs on the machine do not change it much."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(time.user + time.system for time in times)


def engine_block_speedup() -> tuple[float, dict[str, float]]:
    import ray

    draw = random.Random(0)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        served = save("1m", Path(scratch) / "model")
        common = {"max_model_len": 256, "kv_cache_gib": 0.25}
        actors = {
            "ours": start_engine("ours", served, EngineConfig(**common)),
            "default": start_engine("default", served, EngineConfig(**common, block_size=VLLM_DEFAULT)),
        }
        pids: dict[str, list[int]] = {}
        for name, actor in actors.items():
            own: Any = ray.get(actor.pids.remote())
            pids[name] = list(own.values())
        for length in LENGTHS:
            rates: dict[str, list[float]] = {name: [] for name in actors}
            for number in range(1 + ROUNDS):  # the first round warms up
                prompts = [tuple(draw.randrange(5, 400) for _ in range(length)) for _ in range(PROMPTS)]
                requests = [SampleRequest(prompt, n=REPLIES, max_tokens=REPLY_TOKENS) for prompt in prompts]
                for name, actor in actors.items():
                    began = cpu_seconds(pids[name])
                    completions, *_ = ray.get(actor.generate_wave.remote(requests, number))
                    tokens = sum(len(reply.token_ids) for replies in completions for reply in replies)
                    rates[name].append(tokens / (cpu_seconds(pids[name]) - began))
            speedups = [ours / theirs for ours, theirs in zip(rates["ours"][1:], rates["default"][1:], strict=True)]
            found[f"prompt_{length}"] = statistics.median(speedups)
            found |= {f"prompt_{length}_{name}_tokens_per_cpu_s": statistics.median(r[1:]) for name, r in rates.items()}
    return found[f"prompt_{LENGTHS[0]}"], found
