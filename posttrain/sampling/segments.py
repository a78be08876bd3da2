"""A segment of shared memory that holds one version of weights, and how parts of tensors lie in it.

    rank 0 ──begin──► segment ◄──write_parts── rank 0, its own parts
                              ◄──write_parts── rank 1, its own parts        no rank gathers what others have

Every process of the host computes the same places from the same list of tensors.
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch
import xxhash

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor, known before its values are.

    Example: TensorSpec("lm_head.weight", torch.float32, (512, 64))
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SegmentPlace(msgspec.Struct, frozen=True):
    """A segment that is being written, as another process of this host opens it."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Part `number` (from 0) of `of` equal parts, along the first dimension, of tensor number `tensor`."""

    tensor: int
    value: torch.Tensor
    number: int = 0
    of: int = 1


class WrittenPart(msgspec.Struct, frozen=True):
    """A part that lies in a segment. checksum: XXH3-64 of its bytes there."""

    tensor: int
    number: int
    of: int
    checksum: int


def write_parts(place: SegmentPlace, specs: Sequence[TensorSpec], parts: Iterable[TensorPart]) -> list[WrittenPart]:
    """Write parts of tensors where they belong. specs: of all tensors. Each part is written before the next is made."""
    offsets, end = offsets_of(specs)
    assert end == place.num_bytes
    buffer = torch.frombuffer(mapped(place), dtype=torch.uint8)
    written = []
    for part in parts:
        spec = specs[part.tensor]
        size = spec.num_bytes // part.of
        start = offsets[part.tensor] + part.number * size
        room = buffer[start : start + size]
        write_tensor(room.view(spec.dtype), part.value.detach())
        written.append(WrittenPart(part.tensor, part.number, part.of, checksum(room)))
    return written


_maps: dict[str, mmap.mmap] = {}  # mapped once: mapping again costs more than the copy


def mapped(place: SegmentPlace) -> mmap.mmap:
    """The segment, mapped by this process."""
    found = _maps.get(place.path)
    if found is None or len(found) != place.num_bytes:
        descriptor = os.open(place.path, os.O_RDWR)
        try:
            found = _maps[place.path] = mmap.mmap(descriptor, place.num_bytes)
        finally:
            os.close(descriptor)
    return found


def forget(path: str) -> None:
    """Map a segment no longer."""
    _maps.pop(path, None)


def offsets_of(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor begins in a segment, and where the last ends."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def write_tensor(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a tensor into its flat place; each matrix of a stack (experts) is transposed.

    vLLM stores experts transposed. It would transpose the whole stack in one strided copy, while generation is paused.
    Transposing one matrix after another here takes a third of the time, and generation goes on meanwhile.
    """
    if value.dim() != 3:
        place.view(value.shape).copy_(value)
        return
    for transposed, matrix in zip(place.view(value.mT.shape), value, strict=True):
        transposed.copy_(matrix.T)


def read_tensor(place: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `write_tensor`, as a view."""
    return place.view(shape[0], shape[2], shape[1]).mT if len(shape) == 3 else place.view(shape)


def checksum(place: torch.Tensor) -> int:
    """XXH3-64 of the bytes of a flat tensor."""
    return xxhash.xxh3_64_intdigest(place.numpy().data)
