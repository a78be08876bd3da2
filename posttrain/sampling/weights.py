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
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from posttrain.errors import PosttrainError
from posttrain.hosts.relay import Relay
from posttrain.hosts.weights import served_name
from posttrain.sampling.manifests import FolderWeights, Road, TensorEntry, WeightManifest

ALIGNMENT = 64
PREFIX = "posttrain-weights-"


class WeightTransferError(PosttrainError):
    """Weights did not arrive as they were sent."""


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


class SharedWeights:
    """The trainer's end: publishes versions into two shared-memory segments in turn.

    The names of the segments carry the mark of the Ray session, which removes them at its end. Each segment is locked
    while its process lives. One without a lock was left behind by a killed process, which can be seen from another
    container too, and the next publisher removes it.

    relay: serves the versions to other hosts; None if all engines are on this one. node: the id of this host in Ray.
    """

    def __init__(self, directory: str | Path = "/dev/shm", relay: Relay | None = None, node: str = ""):
        remove_abandoned(Path(directory))
        session = os.environ.get("POSTTRAIN_SESSION", "none")
        stem = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{session}"
        self._peer = f"process {os.getpid()} on {socket.gethostname()}"
        self._relay = relay
        self._node = node
        self._publisher = stem
        self._serials: dict[Path, int] = {}  # of what lies in each segment
        self._paths = [Path(directory) / f"{stem}-{half}" for half in "ab"]
        self._descriptors: dict[Path, int] = {}
        self._segments: dict[Path, mmap.mmap] = {}  # mapped once: mapping again costs more than the copy

    def publish(
        self, specs: Sequence[TensorSpec], values: Iterable[torch.Tensor], policy_version: int
    ) -> WeightManifest:
        """Write tensors of any dtype and device, under their checkpoint names, as `policy_version`.

        values: one for each of `specs`, in their order. Each is written before the iterator gives the next, so that no
        more than one whole tensor is in memory.
        """
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT
        entries = []
        path = self._paths[policy_version % 2]
        if self._relay is not None and path in self._serials:
            self._relay.drop(served_name(self._publisher, self._serials[path]))
        buffer = torch.frombuffer(self._segment(path, end), dtype=torch.uint8)
        for value, spec, offset in zip(values, specs, offsets, strict=True):
            place = buffer[offset : offset + spec.num_bytes]
            _write(place.view(spec.dtype), value.detach())
            dtype = str(spec.dtype).removeprefix("torch.")
            entries.append(TensorEntry(spec.name, dtype, spec.shape, offset, checksum(place)))
        road = self._serve(path, end)
        return WeightManifest(str(path), policy_version, end, self._peer, tuple(entries), road)

    def _serve(self, path: Path, num_bytes: int) -> Road | None:
        """Let other hosts read a segment that has just been written."""
        if self._relay is None:
            return None
        serial = self._serials[path] = 1 + max(self._serials.values(), default=0)
        self._relay.hold(served_name(self._publisher, serial), self._descriptors[path], num_bytes)
        return Road(self._publisher, serial, self._node, (self._relay.source,))

    def _segment(self, path: Path, num_bytes: int) -> mmap.mmap:
        segment = self._segments.get(path)
        if segment is None or len(segment) != num_bytes:
            descriptor = self._open(path)
            os.ftruncate(descriptor, num_bytes)
            segment = self._segments[path] = mmap.mmap(descriptor, num_bytes)
        return segment

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
        if self._relay is not None:
            self._relay.close()
        self._segments.clear()
        for path, descriptor in self._descriptors.items():
            path.unlink(missing_ok=True)
            os.close(descriptor)
        self._descriptors = {}


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


def _write(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a tensor into its flat place; each matrix of a stack (experts) is transposed.

    vLLM stores experts transposed. It would transpose the whole stack in one strided copy, while generation is paused.
    Transposing one matrix after another here takes a third of the time, and generation goes on meanwhile.
    """
    if value.dim() != 3:
        place.view(value.shape).copy_(value)
        return
    for transposed, matrix in zip(place.view(value.mT.shape), value, strict=True):
        transposed.copy_(matrix.T)


def _read(place: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_write`, as a view."""
    return place.view(shape[0], shape[2], shape[1]).mT if len(shape) == 3 else place.view(shape)


def checksum(place: torch.Tensor) -> int:
    """XXH3-64 of the bytes of a flat tensor."""
    return xxhash.xxh3_64_intdigest(place.numpy().data)


def open_weights(source: WeightManifest | FolderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) from shared memory, whose checksums are left to `verify`, or from a folder."""
    if isinstance(source, FolderWeights):
        yield from _open_folder(Path(source.folder))
    else:
        for entry, place in _places(source):
            yield entry.name, _read(place.view(getattr(torch, entry.dtype)), entry.shape)


def verify(manifest: WeightManifest, note: Callable[[str], None] = lambda text: None) -> None:
    """Compare the checksums of all tensors in shared memory with those of the manifest.

    note: called with the name of each tensor before it is read. Raises WeightTransferError for the first that differs.
    """
    for entry, place in _places(manifest):
        note(f"the checksum of tensor {entry.name}")
        if (found := checksum(place)) != entry.checksum:
            raise WeightTransferError(
                f"{_sender(manifest)}: tensor {entry.name} has checksum {found:#x} in {manifest.path}, not "
                f"{entry.checksum:#x}"
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
