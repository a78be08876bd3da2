"""Figures of rl.py for sending new weights from the trainer to an engine through shared memory, in fp32.

weight_update_vs_memcpy_{1m,50m,300m}  time of a copy of as many bytes, tensor by tensor on one thread / time of an
                                       update, from the moment when the trainer begins to publish until the engine
                                       answers that it continues, with replies in flight. Beside it in milliseconds: the
                                       copy, the whole update, the trainer's part of it, the pause of generation, and
                                       the pause without the copy and 20 ms (for which vLLM's own pause sleeps); and
                                       the phases of the engine's part (`EngineActor.update_phases`). `loading_` is of a
                                       second engine, which loads while generation is paused, as engines on GPUs do
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rl_models import build, save, start_engine

from posttrain.config.engines import EngineConfig
from posttrain.pipeline.ray_session import ray_session
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.weights import SharedWeights, TensorSpec

ROUNDS, IN_FLIGHT = 7, 4
ENGINE = EngineConfig(max_model_len=2048, kv_cache_gib=0.25)


def weight_update(size: str) -> tuple[float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        served = save(size, Path(scratch) / "model")
        engines = {
            "": start_engine("engine", served, ENGINE),
            "loading_": start_engine("loading", served, ENGINE, POSTTRAIN_WITHOUT_TWIN="1"),
        }
        weights = {name: value.detach() for name, value in build(size, seed=1).state_dict().items()}
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in weights.items()]
        num_bytes = sum(spec.num_bytes for spec in specs)
        target = torch.empty(num_bytes // 4)
        times = defaultdict[str, list[float]](list)
        shared = SharedWeights()
        try:
            for turn in range(1 + ROUNDS):
                times["copy"].append(_copy_ms(weights, target))
                for mark, engine in engines.items():
                    for name, spent_ms in _update_ms(engine, shared, specs, weights=weights, turn=turn).items():
                        times[mark + name].append(spent_ms)
        finally:
            shared.close()
    return _summary(times, num_bytes)


def _update_ms(
    engine: Any, shared: SharedWeights, specs: list[TensorSpec], *, weights: dict[str, torch.Tensor], turn: int
) -> dict[str, float]:
    """Milliseconds of the parts of one update, with replies in flight."""
    import ray

    ray.get(engine.submit.remote([(turn, SampleRequest(tuple(range(5, 25)), n=IN_FLIGHT, max_tokens=1900))]))
    time.sleep(0.2)
    began = time.perf_counter()
    # Versions are even numbers, so that one segment is enough.
    manifest = shared.publish(specs, iter(weights.values()), 2 * turn)
    published = time.perf_counter()
    updated: Any = ray.get(engine.update_weights.remote(manifest, 2 * turn))
    ended = time.perf_counter()
    parts = {"update": ended - began, "publish": published - began, "pause": updated.ended - updated.began}
    parts.update(ray.get(engine.update_phases.remote()))
    ray.get(engine.cancel.remote([turn]))
    return {name: 1e3 * spent_s for name, spent_s in parts.items()}


def _summary(times: Mapping[str, list[float]], num_bytes: int) -> tuple[float, dict[str, float]]:
    kept = {name: values[1:] for name, values in times.items()}  # the first round warms up
    ratio = statistics.median(copy / update for copy, update in zip(kept["copy"], kept["update"], strict=True))
    medians: dict[str, Any] = {f"{name}_ms": statistics.median(values) for name, values in kept.items()}
    beyond = medians["pause_ms"] - medians["copy_ms"] - 20
    return ratio, {**medians, "pause_beyond_goal_ms": beyond, "mib": num_bytes / 2**20}


def _copy_ms(weights: dict[str, torch.Tensor], target: torch.Tensor) -> float:
    began, place = time.perf_counter(), 0
    for value in weights.values():
        target[place : place + value.numel()].view(value.shape).copy_(value)
        place += value.numel()
    return 1e3 * (time.perf_counter() - began)
