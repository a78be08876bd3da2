"""Measure what two ranks that share the experts need to publish their weights, beyond the memory of the training.

    python benchmarks/publish_ranks.py RANK WORLD PORT    one rank; prints its figures as JSON

Each way is taken three times after one to warm up. gathered: every rank gets each tensor whole, and rank 0 writes it.
parts: each rank writes its own experts and its share of the rest into one segment. Memory is what belongs to the
process alone, so the segment is left out of both.
"""

import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_processes import run_ranks

ROUNDS = 3
LOOK_S = 0.0005


def publish_peak() -> tuple[float, dict[str, Any]]:
    """The larger of both ranks' peaks by parts / that of gathering, and further figures."""
    found = [json.loads(output.splitlines()[-1]) for output in run_ranks(__file__, 2)]
    peaks = {way: max(each[way]["peak_mib"] for each in found) for way in ("gathered", "parts")}
    further = {"model_mib": found[0]["model_mib"], "rank0": found[0], "rank1": found[1]}
    return peaks["parts"] / peaks["gathered"], further


def _own_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _measured(run: Callable[[], object]) -> dict[str, float]:
    """The peak of the process's own memory above that before, in MiB, and the seconds of one call."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(LOOK_S):
            peak = max(peak, _own_kib())

    before, began = _own_kib(), time.perf_counter()
    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(ROUNDS):
        run()
    seconds = (time.perf_counter() - began) / ROUNDS
    ended.set()
    watching.join()
    return {"peak_mib": round((peak - before) / 1024, 1), "seconds": round(seconds, 3)}


def _rank(rank: int, world: int, port: int) -> dict[str, Any]:
    import torch
    from moe import config

    from posttrain.config.training import OptimizerConfig, ParallelConfig
    from posttrain.model import NativeLlama4ForCausalLM
    from posttrain.parallel.engine import join_ranks, start_engine
    from posttrain.parallel.tensors import read_weights, whole_tensors
    from posttrain.rl.training.publishing import publish
    from posttrain.sampling.segments import TensorSpec
    from posttrain.sampling.weights import SharedWeights

    torch.set_num_threads(1)
    join_ranks(rank, world, ("127.0.0.1", port))
    torch.manual_seed(0)
    model = NativeLlama4ForCausalLM(config(16)).train()
    parallel = ParallelConfig(processes=world, expert=world, zero=1)
    engine: Any = start_engine(model, parallel, OptimizerConfig(), dtype="float32")
    items = whole_tensors(engine.module)
    specs = [TensorSpec(item.name, item.dtype, item.shape) for item in items]
    found: dict[str, Any] = {"model_mib": round(sum(item.num_bytes for item in items) / 2**20, 1)}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        weights = SharedWeights(folder)

        def gathered() -> None:
            values = (value for _, value in read_weights(items))
            if rank == 0:
                weights.publish(specs, values, 0)
            else:
                for _ in values:
                    pass

        for way, run in (("gathered", gathered), ("parts", lambda: publish(weights, items, 0))):
            run()
            found[way] = _measured(run)
        weights.close()
    return found


if __name__ == "__main__":
    from measure import MMAP_THRESHOLD

    from posttrain.parallel.ending import end_rank

    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)  # large blocks are given back at once, or free ones would count
    print(json.dumps(_rank(*map(int, sys.argv[1:]))), flush=True)
    end_rank()
