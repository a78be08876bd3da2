"""Weights that a trainer publishes on one host, brought to the memory of another before its engines are paused.

    trainer's segment ──► host 1's copy ──► host 2's copy ──► ...        relay.py; each tensor is checked as it arrives
                              └─► the engines of host 1 read it as if the trainer were on their host

A copy has no name in any file system: its path leads through /proc to a file that only the agent's process holds open,
so nothing is left when the agent ends, however it ends.
"""

import mmap
import os
from concurrent.futures import Executor, Future

import msgspec
import xxhash

from posttrain.hosts.relay import Mismatch, Relay, RelayError, Source, pull

MAX_PUBLISHERS = 2  # two stages may train at the same time; a publisher that was lost is succeeded by another


class PlacedTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies in a segment, in bytes. checksum: XXH3-64 of its bytes."""

    name: str
    offset: int
    num_bytes: int
    checksum: int


class WeightsOffer(msgspec.Struct, frozen=True):
    """One version in a segment, as its host and those before this one serve it.

    publisher: a name that no other publisher has. serial: counts what it has published. sources: in the order of
    preference, the publisher itself last.
    """

    publisher: str
    serial: int
    policy_version: int
    num_bytes: int
    tensors: tuple[PlacedTensor, ...]
    sources: tuple[Source, ...]

    @property
    def served_name(self) -> str:
        """What relays call it."""
        return served_name(self.publisher, self.serial)


def served_name(publisher: str, serial: int) -> str:
    """The name under which relays serve what a publisher has published."""
    return f"weights {serial} of {publisher}"


class _Copy:
    """Memory for every second version of one publisher. serial: what it holds."""

    def __init__(self, num_bytes: int):
        self.descriptor = os.memfd_create("posttrain-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_bytes)
        self.num_bytes = num_bytes
        self.place = memoryview(mmap.mmap(self.descriptor, num_bytes))
        self.serial = 0

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"


class WeightCopies:
    """The versions that one host has. Several engines may ask for the same one at the same time; it is pulled once."""

    def __init__(self, relay: Relay):
        self._relay = relay
        self._copies: dict[str, dict[int, _Copy]] = {}  # by publisher, then by half
        self._coming: dict[str, Future[str]] = {}  # by the name of the version

    def bring(self, offer: WeightsOffer, deadline_s: float, threads: Executor) -> Future[str]:
        """The path of a version on this host, once it is there and checked. threads: pulls it.

        The future raises RelayError, which names peer, version and tensor, if no byte arrives for `deadline_s`.
        """
        name = offer.served_name
        coming = self._coming.get(name)
        if coming is None or (coming.done() and coming.exception() is not None):
            coming = self._coming[name] = threads.submit(self._pull, offer, self._copy_for(offer), deadline_s)
        return coming

    def _copy_for(self, offer: WeightsOffer) -> _Copy:
        """The memory for a version. What it held before, two versions ago, is served no longer."""
        halves = self._copies.pop(offer.publisher, {})
        self._copies[offer.publisher] = halves  # the last one is the one in use
        for publisher in list(self._copies)[:-MAX_PUBLISHERS]:
            self._forget(publisher)
        half = offer.serial % 2
        copy = halves.get(half)
        if copy is not None and copy.serial != offer.serial:
            self._drop(offer.publisher, copy.serial)
        if copy is None or copy.num_bytes != offer.num_bytes:
            if copy is not None:
                os.close(copy.descriptor)
            copy = halves[half] = _Copy(offer.num_bytes)
        copy.serial = offer.serial
        return copy

    def _forget(self, publisher: str) -> None:
        for copy in self._copies.pop(publisher).values():
            self._drop(publisher, copy.serial)
            os.close(copy.descriptor)

    def _drop(self, publisher: str, serial: int) -> None:
        name = served_name(publisher, serial)
        self._relay.drop(name)
        self._coming.pop(name, None)

    def _pull(self, offer: WeightsOffer, copy: _Copy, deadline_s: float) -> str:
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
        return copy.path


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
