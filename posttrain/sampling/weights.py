"""Weights from a trainer to its engines: written into shared memory once, read with checksums.

The trainer's publisher owns two segments and writes them in turn, so that it never overwrites the version that an
engine is still reading. The engine is sent a manifest with the names, dtypes, shapes and offsets of the tensors: plain
JSON, never a pickle. `open_weights` also reads a folder of safetensors, so that an engine loads a checkpoint and takes
an update by the same code. Engines on other hosts read a copy that is brought to theirs (roads.py).
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from posttrain.errors import PosttrainError
from posttrain.hosts.deltas import Delta, PlacedTensor, write_delta
from posttrain.hosts.relay import Relay
from posttrain.hosts.weights import delta_file, delta_name, served_name
from posttrain.sampling.manifests import FolderWeights, Road, TensorEntry, WeightManifest, placed
from posttrain.sampling.segments import (
    SegmentPlace,
    TensorPart,
    TensorSpec,
    WrittenPart,
    checksum,
    forget,
    mapped,
    offsets_of,
    read_tensor,
    write_parts,
)

PREFIX = "posttrain-weights-"
WORTH = 0.5  # a delta is served if it has at most this share of the bytes


class WeightTransferError(PosttrainError):
    """Weights did not arrive as they were sent."""


class SharedWeights:
    """The trainer's end: publishes versions into two shared-memory segments in turn.

    The names of the segments carry the mark of the Ray session, which removes them at its end. Each segment is locked
    while its process lives. One without a lock was left behind by a killed process, which can be seen from another
    container too, and the next publisher removes it.

    relay: serves the versions to other hosts; None if all engines are on this one. node: the id of this host in Ray.
    delta: whether it also serves what changed since the version before (hosts/deltas.py).
    """

    def __init__(
        self, directory: str | Path = "/dev/shm", relay: Relay | None = None, node: str = "", *, delta: bool = False
    ):
        remove_abandoned(Path(directory))
        session = os.environ.get("POSTTRAIN_SESSION", "none")
        stem = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{session}"
        self._peer = f"process {os.getpid()} on {socket.gethostname()}"
        self._relay = relay
        self._node = node
        self.delta = delta
        self._placed: dict[Path, tuple[PlacedTensor, ...]] = {}  # what lies in each segment
        self._frames: tuple[str, int] | None = None  # the delta that is served: its name and descriptor
        self._publisher = stem
        self._serials: dict[Path, int] = {}  # of what lies in each segment
        self._paths = [Path(directory) / f"{stem}-{half}" for half in "ab"]
        self._descriptors: dict[Path, int] = {}
        self._segments: dict[Path, mmap.mmap] = {}

    def publish(
        self, specs: Sequence[TensorSpec], values: Iterable[torch.Tensor], policy_version: int
    ) -> WeightManifest:
        """Write tensors of any dtype and device, under their checkpoint names, as `policy_version`.

        values: one for each of `specs`, in their order. Each is written before the iterator gives the next, so that no
        more than one whole tensor is in memory.
        """
        place = self.begin(specs, policy_version)
        parts = (TensorPart(number, value) for number, value in enumerate(values))
        return self.finish(specs, write_parts(place, specs, parts), policy_version)

    def begin(self, specs: Sequence[TensorSpec], policy_version: int) -> SegmentPlace:
        """Make room for a version, into which this process, and others of this host, write parts (`write_parts`)."""
        path = self._paths[policy_version % 2]
        self._drop(path)
        place = SegmentPlace(str(path), offsets_of(specs)[1])
        descriptor = self._open(path)
        if os.fstat(descriptor).st_size != place.num_bytes:
            os.ftruncate(descriptor, place.num_bytes)
        self._segments[path] = mapped(place)
        return place

    def finish(
        self, specs: Sequence[TensorSpec], written: Iterable[WrittenPart], policy_version: int
    ) -> WeightManifest:
        """Publish a version whose parts are all written. Raises WeightTransferError if one is missing."""
        path = self._paths[policy_version % 2]
        parts: dict[int, dict[int, WrittenPart]] = {}
        for part in written:
            parts.setdefault(part.tensor, {})[part.number] = part
        offsets, end = offsets_of(specs)
        entries = []
        for number, (spec, offset) in enumerate(zip(specs, offsets, strict=True)):
            own = parts.get(number, {})
            of = next(iter(own.values())).of if own else 1
            if sorted(own) != list(range(of)):
                raise WeightTransferError(f"policy version {policy_version}: of tensor {spec.name} a part is missing")
            dtype = str(spec.dtype).removeprefix("torch.")
            entries.append(TensorEntry(spec.name, dtype, spec.shape, offset, tuple(own[n].checksum for n in range(of))))
        self._placed[path] = placed(entries)
        road = self._serve(path, end)
        return WeightManifest(str(path), policy_version, end, self._peer, tuple(entries), road)

    def _serve(self, path: Path, num_bytes: int) -> Road | None:
        """Let other hosts read a segment that has just been written."""
        if self._relay is None:
            return None
        serial = self._serials[path] = 1 + max(self._serials.values(), default=0)
        self._relay.hold(served_name(self._publisher, serial), self._descriptors[path], num_bytes)
        delta = self._serve_delta(self._relay, path, serial) if self.delta else None
        return Road(self._publisher, serial, self._node, (self._relay.source,), delta)

    def _serve_delta(self, relay: Relay, path: Path, serial: int) -> Delta | None:
        """Let other hosts read what changed since the serial before; None if that is not in the other segment, or is
        not much less than all.
        """
        other = next(each for each in self._paths if each != path)
        if self._serials.get(other) != serial - 1 or _layout(self._placed[other]) != _layout(self._placed[path]):
            return None
        descriptor = delta_file()
        new, old = (memoryview(self._segments[each]) for each in (path, other))
        delta = Delta(serial - 1, write_delta(descriptor, new, old, tensors=self._placed[path]))
        if delta.num_bytes > len(new) * WORTH:
            os.close(descriptor)
            return None
        self._frames = delta_name(self._publisher, serial), descriptor
        relay.hold(*self._frames, delta.num_bytes)
        return delta

    def _drop(self, path: Path) -> None:
        """Serve no longer what lies in a segment, nor the delta of the version that was published last."""
        if self._relay is not None and path in self._serials:
            self._relay.drop(served_name(self._publisher, self._serials[path]))
        if self._relay is not None and self._frames is not None:
            name, descriptor = self._frames
            self._relay.drop(name)
            os.close(descriptor)
            self._frames = None

    def _open(self, path: Path) -> int:
        """The segment's descriptor. A new file is locked before it is renamed, so no other process sees it unlocked."""
        if path not in self._descriptors:
            aside = path.with_name(f".{path.name}")
            self._descriptors[path] = os.open(aside, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._descriptors[path], fcntl.LOCK_EX)
            aside.rename(path)
        return self._descriptors[path]

    def close(self) -> None:
        """Remove the segments. Readers that still have them mapped keep them."""
        for path in self._paths:
            self._drop(path)
        if self._relay is not None:
            self._relay.close()
        self._segments.clear()
        for path, descriptor in self._descriptors.items():
            forget(str(path))
            path.unlink(missing_ok=True)
            os.close(descriptor)
        self._descriptors = {}


def _layout(tensors: Sequence[PlacedTensor]) -> list[tuple[str, int, int]]:
    return [(tensor.name, tensor.offset, tensor.num_bytes) for tensor in tensors]


def remove_abandoned(directory: Path) -> None:
    """Remove segments of publishers that ended without `close`."""
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or removed meanwhile
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                path.unlink()
            finally:
                os.close(descriptor)


def open_weights(source: WeightManifest | FolderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) from shared memory, whose checksums are left to `verify`, or from a folder."""
    if isinstance(source, FolderWeights):
        yield from _open_folder(Path(source.folder))
    else:
        for entry, place in _places(source):
            yield entry.name, read_tensor(place.view(getattr(torch, entry.dtype)), entry.shape)


def verify(manifest: WeightManifest, note: Callable[[str], None] = lambda text: None) -> None:
    """Compare the checksums of all tensors in shared memory with those of the manifest.

    note: called with the name of each tensor before it is read. Raises WeightTransferError for the first that differs.
    """
    for entry, place in _places(manifest):
        note(f"the checksum of tensor {entry.name}")
        parts = place.view(len(entry.checksums), -1) if place.numel() else place.unsqueeze(0)
        for part, wanted in zip(parts, entry.checksums, strict=True):
            if (found := checksum(part)) != wanted:
                raise WeightTransferError(
                    f"{_sender(manifest)}: tensor {entry.name} has checksum {found:#x} in {manifest.path}, not "
                    f"{wanted:#x}"
                )


def _sender(manifest: WeightManifest) -> str:
    return f"policy version {manifest.policy_version} from {manifest.peer}"


def _places(manifest: WeightManifest) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """Each tensor's entry, and its bytes in shared memory."""
    try:
        descriptor = os.open(manifest.path, os.O_RDONLY)
    except FileNotFoundError:
        raise WeightTransferError(
            f"{_sender(manifest)}: the segment {manifest.path} is gone; the trainer has ended or runs on another host"
        ) from None
    try:
        # Private and writable only because torch has no read-only tensors; nobody writes.
        segment = mmap.mmap(descriptor, manifest.num_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    buffer = torch.frombuffer(segment, dtype=torch.uint8)
    for entry in manifest.tensors:
        num_bytes = getattr(torch, entry.dtype).itemsize * torch.Size(entry.shape).numel()
        yield entry, buffer[entry.offset : entry.offset + num_bytes]


def _open_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightTransferError(f"{folder}: no safetensors to load")
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, tensors.get_tensor(name)
