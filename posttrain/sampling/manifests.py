"""Where an engine finds weights: records that cross between processes, as plain JSON where vLLM carries them.

trainer ── WeightManifest (shared memory) or GpuManifest ──► controller ──► EngineActor.update_weights
a stage's start ── FolderWeights ──────────────────────────────────────────►
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from posttrain.hosts.deltas import Delta, PlacedTensor
from posttrain.hosts.relay import Source


class TensorEntry(msgspec.Struct, frozen=True):
    """Where one tensor lies in a segment. `dtype` is torch's name without the prefix; `offset` is in bytes.

    A stack of matrices lies there with each transposed, see `SharedWeights`. checksums: XXH3-64 of consecutive parts of
    its bytes, all of one size: one of each process that wrote a part. A CRC-32 takes three times as long as the copy,
    this half as long. Example: `TensorEntry("lm_head.weight", "bfloat16", (495, 64), offset=128, checksums=(0x9B,))`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksums: tuple[int, ...]


def placed(entries: Iterable[TensorEntry]) -> tuple[PlacedTensor, ...]:
    """The parts of tensors that have checksums of their own, with names for messages."""
    import torch  # not in the controller, which only makes chains

    found = []
    for entry in entries:
        parts = len(entry.checksums)
        size = getattr(torch, entry.dtype).itemsize * torch.Size(entry.shape).numel() // parts
        for number, checksum in enumerate(entry.checksums):
            name = entry.name if parts == 1 else f"{entry.name} (part {number + 1} of {parts})"
            found.append(PlacedTensor(name, entry.offset + number * size, size, checksum))
    return tuple(found)


class Road(msgspec.Struct, frozen=True):
    """How another host gets a version. publisher: a name that no other publisher has. node: the trainer's, in Ray.

    serial: counts what the publisher has published; a version may be published again with other values. sources: whom
    to ask for the bytes, in the order of preference. delta: what changed since the serial before, if that is offered.
    Example: `Road("trainer-7", 3, "a1b2", (source,))`.
    """

    publisher: str
    serial: int
    node: str
    sources: tuple[Source, ...]
    delta: Delta | None = None


class WeightManifest(msgspec.Struct, frozen=True, tag_field="kind", tag="segment"):
    """One version in a shared-memory segment. `peer` says who wrote it, for messages. road: None in a local session.

    Example: `WeightManifest("/dev/shm/posttrain-weights-7-a", 3, 4096, "process 7 on host", (entry, ...))`.
    """

    path: str
    policy_version: int
    num_bytes: int
    peer: str
    tensors: tuple[TensorEntry, ...]
    road: Road | None = None


class GpuManifest(msgspec.Struct, frozen=True, tag_field="kind", tag="gpu"):
    """One version on the trainer's GPU. `init` and `update` are the fields of vLLM's init and update infos."""

    backend: Literal["nccl", "ipc"]
    policy_version: int
    peer: str
    init: dict[str, Any]
    update: dict[str, Any]


class FolderWeights(msgspec.Struct, frozen=True, tag_field="kind", tag="folder"):
    """The weights of a Hugging Face folder. Example: `FolderWeights("runs/a/sft/model")`."""

    folder: str


Manifest = WeightManifest | GpuManifest
WeightSource = WeightManifest | GpuManifest | FolderWeights


def source_for(manifest: Manifest, engine: int, tensor_parallel: int) -> Manifest:
    """The manifest as engine number `engine` (from 0) takes it: with nccl each of its GPUs has a rank of its own."""
    if not isinstance(manifest, GpuManifest) or manifest.backend != "nccl":
        return manifest
    return msgspec.structs.replace(manifest, init={**manifest.init, "rank_offset": 1 + engine * tensor_parallel})


def to_plain(source: WeightSource) -> dict[str, Any]:
    """The source as JSON types, for the way through vLLM to its workers."""
    return msgspec.to_builtins(source)


def from_plain(data: dict[str, Any]) -> WeightSource:
    """The inverse of `to_plain`; raises msgspec.ValidationError that names the field."""
    return msgspec.convert(data, WeightSource)
