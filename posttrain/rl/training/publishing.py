"""Publishes the weights of all ranks for the engines.

On one host every rank writes what it has into the same segment of shared memory, so that no rank gathers the model.
With ranks on several hosts, or another backend, rank 0 gathers one tensor after the other and writes it.
"""

import os
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from posttrain.parallel.tensors import WholeTensor, own_parts, read_weights
from posttrain.sampling.manifests import Manifest
from posttrain.sampling.segments import SegmentPlace, TensorPart, TensorSpec, WrittenPart, write_parts
from posttrain.sampling.transfer import Publisher
from posttrain.sampling.weights import SharedWeights


def publish(weights: Publisher, items: list[WholeTensor], policy_version: int) -> Manifest | None:
    """Publish a version; collective. weights: this rank's, of which that of rank 0 is used.

    Returns the manifest on rank 0 and None on the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    specs = [TensorSpec(item.name, item.dtype, item.shape) for item in items]
    if world > 1 and isinstance(weights, SharedWeights):
        begun: list[SegmentPlace | None] = [weights.begin(specs, policy_version) if rank == 0 else None]
        dist.broadcast_object_list(begun)
        if (place := begun[0]) is not None and _all_see(place):
            parts = (
                TensorPart(number, value, own.number, own.of) for number, own, value in own_parts(items, rank, world)
            )
            written = _gathered(write_parts(place, specs, parts), rank, world)
            return weights.finish(specs, written, policy_version) if rank == 0 else None
    values = (value for _, value in read_weights(items))
    if rank:
        for _ in values:  # take part in gathering the tensors, which rank 0 writes
            pass
        return None
    return weights.publish(specs, values, policy_version)


def _all_see(place: SegmentPlace) -> bool:
    """Whether the segment is in the shared memory of every rank's host."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = torch.tensor([os.path.exists(place.path)], dtype=torch.int32, device=device)
    dist.all_reduce(seen, dist.ReduceOp.MIN)
    return bool(seen.item())


def _gathered(written: list[WrittenPart], rank: int, world: int) -> list[WrittenPart]:
    """What all ranks have written, on rank 0; nothing on the others. Ends when all have."""
    found: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(written, found)
    return list(chain.from_iterable(found or ()))
