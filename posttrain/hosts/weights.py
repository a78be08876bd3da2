"""Weights that a trainer publishes on one host, brought to the memory of another before its engines are paused.

    trainer's segment ──► host 1's copy ──► host 2's copy ──► ...        relay.py; each tensor is checked as it arrives
                              └─► the engines of host 1 read it as if the trainer were on their host

A copy has no name in any file system: its path leads through /proc to a file that only the agent's process holds open,
so nothing is left when the agent ends, however it ends.

If the publisher offers what changed since the version before (deltas.py), a host that has that version pulls this
alone. Any other host, such as one that has missed a version, pulls a whole copy. So does one whose delta fails.
"""

import mmap
import os
from concurrent.futures import Executor, Future

import msgspec
import xxhash

from posttrain.hosts.deltas import Delta, DeltaReader, PlacedTensor
from posttrain.hosts.relay import Mismatch, Relay, RelayError, Source, pull

MAX_PUBLISHERS = 2  # two stages may train at the same time; a publisher that was lost is succeeded by another


class WeightsOffer(msgspec.Struct, frozen=True):
    """One version in a segment, as its host and those before this one serve it.

    publisher: a name that no other publisher has. serial: counts what it has published. sources: in the order of
    preference, the publisher itself last. delta: what changed since the version before; None if that is not offered.
    """

    publisher: str
    serial: int
    policy_version: int
    num_bytes: int
    tensors: tuple[PlacedTensor, ...]
    sources: tuple[Source, ...]
    delta: Delta | None = None

    @property
    def served_name(self) -> str:
        """What relays call it."""
        return served_name(self.publisher, self.serial)


def served_name(publisher: str, serial: int) -> str:
    """The name under which relays serve what a publisher has published."""
    return f"weights {serial} of {publisher}"


def delta_name(publisher: str, serial: int) -> str:
    """The name under which relays serve what changed from the version before to this one."""
    return f"delta {serial} of {publisher}"


def delta_file() -> int:
    """The descriptor of an empty file in memory, for frames."""
    return os.memfd_create("posttrain-delta", os.MFD_CLOEXEC)


class _Copy:
    """Memory for every second version of one publisher. serial: what it holds. is_whole: whether all of that is there.

    frames: the descriptor of the delta by which it came, which later hosts of a chain may still read; None without one.
    """

    def __init__(self, num_bytes: int):
        self.descriptor = os.memfd_create("posttrain-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_bytes)
        self.num_bytes = num_bytes
        self.place = memoryview(mmap.mmap(self.descriptor, num_bytes))
        self.serial = 0
        self.is_whole = False
        self.frames: int | None = None

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"


class WeightCopies:
    """The versions that one host has. Several engines may ask for the same one at the same time; it is pulled once.

    num_pulled: bytes that came from other hosts so far, for versions that are here.
    """

    def __init__(self, relay: Relay):
        self.num_pulled = 0
        self._relay = relay
        self._copies: dict[str, dict[int, _Copy]] = {}  # by publisher, then by half
        self._coming: dict[str, Future[str]] = {}  # by the name of the version

    def bring(self, offer: WeightsOffer, deadline_s: float, threads: Executor) -> Future[str]:
        """The path of a version on this host, once it is there and checked. Called in one thread; `threads` pull it.

        The future raises RelayError, which names peer, version and tensor, if no byte arrives for `deadline_s`.
        """
        name = offer.served_name
        coming = self._coming.get(name)
        if coming is None or (coming.done() and coming.exception() is not None):
            base, copy = self._base_of(offer), self._copy_for(offer)
            coming = self._coming[name] = threads.submit(self._bring, offer, copy, base, deadline_s=deadline_s)
        return coming

    def _base_of(self, offer: WeightsOffer) -> _Copy | None:
        """The version to which the delta of an offer may be applied; None if this host does not have it."""
        base = self._copies.get(offer.publisher, {}).get(1 - offer.serial % 2)
        if offer.delta is None or base is None or not base.is_whole or base.num_bytes != offer.num_bytes:
            return None
        return base if base.serial == offer.delta.base else None

    def _copy_for(self, offer: WeightsOffer) -> _Copy:
        """The memory for a version. What it held before, two versions ago, is served no longer."""
        halves = self._copies.pop(offer.publisher, {})
        self._copies[offer.publisher] = halves  # the last one is the one in use
        for publisher in list(self._copies)[:-MAX_PUBLISHERS]:
            self._forget(publisher)
        half = offer.serial % 2
        copy = halves.get(half)
        if copy is not None and copy.serial != offer.serial:
            self._drop(offer.publisher, copy)
        if copy is None or copy.num_bytes != offer.num_bytes:
            if copy is not None:
                os.close(copy.descriptor)
            copy = halves[half] = _Copy(offer.num_bytes)
        copy.serial, copy.is_whole = offer.serial, False
        return copy

    def _forget(self, publisher: str) -> None:
        for copy in self._copies.pop(publisher).values():
            self._drop(publisher, copy)
            os.close(copy.descriptor)

    def _drop(self, publisher: str, copy: _Copy) -> None:
        name = served_name(publisher, copy.serial)
        self._relay.drop(name)
        self._relay.drop(delta_name(publisher, copy.serial))
        if copy.frames is not None:
            os.close(copy.frames)
            copy.frames = None
        self._coming.pop(name, None)

    def _bring(self, offer: WeightsOffer, copy: _Copy, base: _Copy | None, *, deadline_s: float) -> str:
        try:
            if base is None or offer.delta is None:
                raise RelayError("this host does not have the version before")
            self._pull_delta(offer, offer.delta, copy, base=base, deadline_s=deadline_s)
        except RelayError:
            self._pull_whole(offer, copy, deadline_s)
        copy.is_whole = True
        return copy.path

    def _pull_delta(self, offer: WeightsOffer, delta: Delta, copy: _Copy, *, base: _Copy, deadline_s: float) -> None:
        """Make the version of the one before and what changed, and serve both. Raises RelayError if that fails."""
        if copy.frames is not None:  # of an attempt that failed
            os.close(copy.frames)
        copy.frames = delta_file()
        name = delta_name(offer.publisher, offer.serial)
        if delta.num_bytes:
            os.ftruncate(copy.frames, delta.num_bytes)
        frames = memoryview(mmap.mmap(copy.frames, delta.num_bytes) if delta.num_bytes else b"")
        reader = DeltaReader(delta, offer.tensors, frames, old=base.place, new=copy.place)
        self._relay.hold(name, copy.frames, delta.num_bytes, have=0)
        reader(0)  # tensors that did not change
        if delta.num_bytes:
            pull(
                name, frames, offer.sources, deadline_s=deadline_s,
                grew=lambda have: self._relay.grew(name, have), check=reader,
            )  # fmt: skip
        self.num_pulled += delta.num_bytes
        self._relay.hold(offer.served_name, copy.descriptor, offer.num_bytes)

    def _pull_whole(self, offer: WeightsOffer, copy: _Copy, deadline_s: float) -> None:
        name = offer.served_name
        check = TensorCheck(offer, copy.place)
        self._relay.hold(name, copy.descriptor, offer.num_bytes, have=0)
        try:
            pull(
                name, copy.place, offer.sources, deadline_s=deadline_s,
                grew=lambda have: self._relay.grew(name, have), check=check,
            )  # fmt: skip
        except RelayError as error:
            raise RelayError(f"policy version {offer.policy_version}, tensor {check.next_name}: {error}") from None
        self.num_pulled += offer.num_bytes


class TensorCheck:
    """Compares the checksum of each tensor of a version as soon as its last byte is in `place`."""

    def __init__(self, offer: WeightsOffer, place: memoryview):
        self._tensors = offer.tensors
        self._place = place
        self._next = 0

    @property
    def next_name(self) -> str:
        """The tensor that is awaited."""
        return self._tensors[self._next].name if self._next < len(self._tensors) else "none"

    def __call__(self, have: int) -> None:
        """Check what is complete in the first `have` bytes. Raises Mismatch with the start of a damaged tensor."""
        while self._next < len(self._tensors):
            tensor = self._tensors[self._next]
            end = tensor.offset + tensor.num_bytes
            if end > have:
                return
            if xxhash.xxh3_64_intdigest(self._place[tensor.offset : end]) != tensor.checksum:
                raise Mismatch(tensor.offset, f"tensor {tensor.name}")
            self._next += 1
