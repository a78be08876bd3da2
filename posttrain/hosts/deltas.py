"""What changed between two versions of weights: the bytes of each tensor XOR those before, compressed by zstd.

    trainer's two segments ──► frames, one a tensor ──► relay ──► frame ^ the host's version before ──► the new version

A tensor that did not change has an empty frame. Nothing is rounded: a tensor has the checksum that it has in a whole
copy. At small learning rates few bf16 weights change in a step, so that most bytes are zero before the compression.
"""

import os
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from posttrain.hosts.relay import Mismatch

CODEC, LEVEL = "zstd", 1


class PlacedTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies in a segment, in bytes. checksum: XXH3-64 of its bytes."""

    name: str
    offset: int
    num_bytes: int
    checksum: int


class Delta(msgspec.Struct, frozen=True):
    """How to get a version from the one before. base: the serial of that. sizes: bytes of each tensor's frame."""

    base: int
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all frames, which lie one behind the other."""
        return sum(self.sizes)


def write_delta(
    descriptor: int, new: memoryview, old: memoryview, *, tensors: Sequence[PlacedTensor]
) -> tuple[int, ...]:
    """Write a frame for each tensor into a file. new, old: segments of two versions with the same tensors.

    tensors: of the new version. Returns the sizes of the frames.
    """
    import pyarrow

    codec, sizes = pyarrow.Codec(CODEC, LEVEL), []
    for tensor in tensors:
        after, before = (_bytes(segment, tensor) for segment in (new, old))
        changed = np.bitwise_xor(after, before)
        frame = codec.compress(changed, asbytes=True) if changed.any() else b""
        sizes.append(len(frame))
        left = memoryview(frame)
        while left:
            left = left[os.write(descriptor, left) :]
    return tuple(sizes)


def _bytes(segment: memoryview, tensor: PlacedTensor) -> np.ndarray:
    return np.frombuffer(segment, np.uint8, tensor.num_bytes, tensor.offset)


class DeltaReader:
    """Makes tensors of `new` from `old` and frames, as soon as each has arrived whole in `frames`. Called by `pull`."""

    def __init__(
        self, delta: Delta, tensors: Sequence[PlacedTensor], frames: memoryview, *, old: memoryview, new: memoryview
    ):
        self._delta = delta
        self._tensors = tensors
        self._frames = frames
        self._old = old
        self._new = new
        self._next = 0
        self._start = 0  # of the next frame

    def __call__(self, have: int) -> None:
        """Take in what is complete in the first `have` bytes of the frames.

        Raises Mismatch with the start of a frame that is damaged, or does not lead to the tensor's checksum.
        """
        while self._next < len(self._tensors) and self._start + self._delta.sizes[self._next] <= have:
            self._take(self._tensors[self._next], self._delta.sizes[self._next])
            self._start += self._delta.sizes[self._next]
            self._next += 1

    def _take(self, tensor: PlacedTensor, size: int) -> None:
        import pyarrow

        old, new = (_bytes(segment, tensor) for segment in (self._old, self._new))
        if size:
            try:
                frame = pyarrow.Codec(CODEC).decompress(
                    self._frames[self._start : self._start + size], decompressed_size=tensor.num_bytes
                )
            except (pyarrow.ArrowException, OSError):
                raise Mismatch(self._start, f"what changed of tensor {tensor.name}") from None
            np.bitwise_xor(old, np.frombuffer(frame, np.uint8), out=new)
        else:
            np.copyto(new, old)
        if xxhash.xxh3_64_intdigest(new.data) != tensor.checksum:
            raise Mismatch(self._start, f"what changed of tensor {tensor.name}")
