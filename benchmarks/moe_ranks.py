"""Measure tokens a second of a training step on two ranks that share the experts, and on one rank.

    python benchmarks/moe_ranks.py RANK WORLD PORT    one rank; rank 0 prints its tokens a second

Every rank is a process with one thread and a DeepSpeed engine. Ranks use gloo and no GPU. Each takes 2,048 tokens a
step, however many ranks there are. So the best possible ratio of two ranks, on two idle cores, is 2.
"""

import statistics
import sys
import time

from rank_processes import run_ranks

ROWS, LENGTH, STEPS, ROUNDS = 16, 128, 6, 3


def ranks_speedup() -> tuple[float, dict[str, float]]:
    """The ratio as the median over rounds, and the medians of tokens a second. A round starts one rank, then two."""
    rates = [[_tokens_per_s(world) for world in (1, 2)] for _ in range(ROUNDS)]
    one, two = (statistics.median(column) for column in zip(*rates, strict=True))
    return statistics.median(two / one for one, two in rates), {"tokens_per_s_1": one, "tokens_per_s_2": two}


def _tokens_per_s(world: int) -> float:
    return float(run_ranks(__file__, world)[0].split()[-1])


def _rank(rank: int, world: int, port: int) -> float:
    """Train as one rank; returns the tokens a second of all ranks in the median step."""
    import torch
    from moe import config

    from posttrain.config.training import OptimizerConfig, ParallelConfig
    from posttrain.model import NativeLlama4ForCausalLM
    from posttrain.parallel.engine import join_ranks, start_engine

    torch.set_num_threads(1)
    join_ranks(rank, world, ("127.0.0.1", port))
    torch.manual_seed(0)
    model = NativeLlama4ForCausalLM(config(16)).train()
    parallel = ParallelConfig(processes=world, expert=world, zero=1)
    engine = start_engine(model, parallel, OptimizerConfig(), dtype="float32")
    ids = torch.randint(1, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    times = []
    for _ in range(1 + STEPS):
        torch.distributed.barrier()
        start = time.perf_counter()
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        times.append(time.perf_counter() - start)
    return world * ROWS * LENGTH / statistics.median(times[1:])


if __name__ == "__main__":
    from posttrain.parallel.ending import end_rank

    number, count, meeting = map(int, sys.argv[1:])
    rate = _rank(number, count, meeting)
    if number == 0:
        print(rate)
    end_rank()
