"""Weights of which only the changes travel between hosts: bit-equal, in order, and a whole copy where that fails."""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from posttrain.hosts.deltas import Delta, DeltaReader, PlacedTensor, write_delta
from posttrain.hosts.relay import Mismatch, Relay, RelayError, Source
from posttrain.hosts.weights import WeightCopies, WeightsOffer, delta_file, delta_name
from posttrain.sampling.manifests import WeightManifest, from_plain, to_plain
from posttrain.sampling.roads import offer_of
from posttrain.sampling.weights import SharedWeights, TensorSpec, checksum, open_weights

Tensors = dict[str, torch.Tensor]


def placed(tensors: list[torch.Tensor]) -> tuple[bytes, list[PlacedTensor]]:
    data, entries = b"", []
    for number, value in enumerate(tensors):
        raw = value.flatten().view(torch.uint8)
        entries.append(PlacedTensor(f"t{number}", len(data), raw.numel(), checksum(raw)))
        data += raw.numpy().tobytes()
    return data, entries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_frames_lead_from_one_version_to_the_next(dtype: torch.dtype):
    torch.manual_seed(0)
    before = [(torch.randn(size) * 50).to(dtype) for size in (1, 1000, 4097, 0, 64)]
    after = [value.clone() for value in before]
    after[0] += 1
    after[1][[3, 700]] *= 2
    after[4] = -after[4]
    old, _ = placed(before)
    new, entries = placed(after)
    descriptor = delta_file()
    delta = Delta(7, write_delta(descriptor, memoryview(new), memoryview(old), tensors=entries))
    assert [size == 0 for size in delta.sizes] == [False, False, True, True, False]
    frames = bytearray(os.pread(descriptor, delta.num_bytes, 0))
    os.close(descriptor)
    made = bytearray(len(new))
    reader = DeltaReader(delta, entries, memoryview(frames), old=memoryview(old), new=memoryview(made))
    for have in range(0, delta.num_bytes + 1, 13):  # as they arrive
        reader(have)
    reader(delta.num_bytes)
    assert bytes(made) == new
    for damaged in range(delta.num_bytes):  # each byte of the frames is covered by a checksum
        frames[damaged] ^= 255
        with pytest.raises(Mismatch, match=r"what changed of tensor t[014]"):
            DeltaReader(delta, entries, memoryview(frames), old=memoryview(old), new=memoryview(made))(delta.num_bytes)
        frames[damaged] ^= 255
    wrong_base = memoryview(new)
    with pytest.raises(Mismatch, match="what changed of tensor t0"):
        DeltaReader(delta, entries, memoryview(frames), old=wrong_base, new=memoryview(made))(delta.num_bytes)


class Trainer:
    """Publishes versions of bf16 tensors, each a small step after the one before."""

    def __init__(self, relay: Relay, folder: Path):
        torch.manual_seed(0)
        self.relay = relay
        self.masters = {f"layer.{index}": torch.randn(1 << 18) * 0.02 for index in range(6)}
        self.weights = SharedWeights(folder, relay, "trainer-node", delta=True)
        self.version = -1

    def publish(self, again: bool = False) -> tuple[WeightManifest, Tensors]:
        """The next version; or the last one once more, with other values."""
        self.version += not again
        for name, value in self.masters.items():
            if name != "layer.5":  # is not trained
                value += 1e-6 * torch.randn_like(value).clamp(-1, 1)
        tensors = {name: value.bfloat16() for name, value in self.masters.items()}
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        manifest = self.weights.publish(specs, tensors.values(), self.version)
        assert from_plain(to_plain(manifest)) == manifest
        return manifest, tensors


class Reader:
    """One host. `bring` returns how many bytes came, after it has compared every tensor."""

    def __init__(self, relay: Relay, threads: ThreadPoolExecutor):
        self.relay = relay
        self.copies = WeightCopies(relay)
        self.threads = threads

    def bring(self, published: tuple[WeightManifest, Tensors], *before: Source, **changes: Any) -> int:
        manifest, tensors = published
        offer = offer_of(manifest)
        offer = replace(offer, sources=(*before, *offer.sources), **changes)
        had = self.copies.num_pulled
        path = self.copies.bring(offer, 2.0, self.threads).result()
        found = dict(open_weights(replace(manifest, path=path, road=None)))
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        return self.copies.num_pulled - had


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Trainer, list[Reader]]]:
    made = [Relay("127.0.0.1") for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        trainer = Trainer(made[0], tmp_path)
        yield trainer, [Reader(relay, threads) for relay in made[1:]]
        trainer.weights.close()
    for relay in made[1:]:
        relay.close()


def whole(manifest: WeightManifest) -> int:
    return manifest.num_bytes


def changes(manifest: WeightManifest) -> int:
    delta = offer_of(manifest).delta
    assert delta is not None
    return delta.num_bytes


@pytest.mark.slow
def test_only_what_changed_travels_and_the_weights_are_bit_equal(hosts):
    trainer, (first, second, _) = hosts
    published = trainer.publish()
    assert first.bring(published) == second.bring(published, first.relay.source) == whole(published[0])
    for _ in range(4):
        published = trainer.publish()
        came = [first.bring(published), second.bring(published, first.relay.source)]
        assert came[0] == came[1] == changes(published[0])
        assert 5 * came[0] < whole(published[0])


@pytest.mark.slow
def test_a_host_that_missed_a_version_or_joins_pulls_a_whole_copy_and_then_changes_again(hosts):
    trainer, (first, second, third) = hosts
    published = trainer.publish()
    first.bring(published)
    second.bring(published)
    published = trainer.publish()
    assert first.bring(published) < whole(published[0]) / 5
    published = trainer.publish()  # the second host has missed one: a delta on top of that would be wrong
    assert first.bring(published) < whole(published[0]) / 5
    assert second.bring(published, first.relay.source) == whole(published[0])  # also from a host that got a delta
    assert third.bring(published, second.relay.source, first.relay.source) == whole(published[0])
    published = trainer.publish()
    assert all(host.bring(published) < whole(published[0]) / 5 for host in (first, second, third))


@pytest.mark.slow
def test_a_version_that_is_published_again_and_other_tensors_are_sent_whole(hosts):
    trainer, (first, *_) = hosts
    first.bring(trainer.publish())
    first.bring(trainer.publish())
    again = trainer.publish(again=True)  # lies where the version before lay, which is overwritten
    assert offer_of(again[0]).delta is None
    assert first.bring(again) == whole(again[0])
    published = trainer.publish()
    assert offer_of(published[0]).delta is not None
    assert first.bring(published) < whole(published[0]) / 5
    trainer.masters["layer.6"] = torch.randn(100)
    published = trainer.publish()
    assert offer_of(published[0]).delta is None
    assert first.bring(published) == whole(published[0])


@pytest.mark.slow
def test_changes_that_are_as_large_as_the_weights_are_not_offered(hosts):
    trainer, (first, *_) = hosts
    first.bring(trainer.publish())
    for value in trainer.masters.values():
        value.normal_()
    published = trainer.publish()
    assert offer_of(published[0]).delta is None
    assert first.bring(published) == whole(published[0])


def serve_damaged(offer: WeightsOffer, trainer: Trainer, relay: Relay, damage: Callable[[bytearray], None]) -> None:
    """Have a relay serve the frames of an offer after `damage`."""
    assert trainer.weights._frames is not None
    assert offer.delta is not None
    frames = bytearray(os.pread(trainer.weights._frames[1], offer.delta.num_bytes, 0))
    damage(frames)
    descriptor = delta_file()
    os.write(descriptor, frames)
    relay.hold(delta_name(offer.publisher, offer.serial), descriptor, offer.delta.num_bytes, have=len(frames))


@pytest.mark.slow
def test_a_host_that_is_lost_or_damages_bytes_in_the_middle_of_a_chain_costs_no_whole_copy(hosts):
    trainer, (middle, last, _) = hosts
    last.bring(trainer.publish())
    for damage in (lambda frames: frames.__delitem__(slice(len(frames) // 2, None)), lambda frames: frames.reverse()):
        published = trainer.publish()
        serve_damaged(offer_of(published[0]), trainer, middle.relay, damage)
        # It goes on from the trainer: at the byte at which the host in the middle ended, or at the damaged frame.
        assert last.bring(published, middle.relay.source) == changes(published[0])


@pytest.mark.slow
def test_changes_that_nobody_serves_are_replaced_by_a_whole_copy(hosts):
    trainer, (first, *_) = hosts
    first.bring(trainer.publish())
    published = trainer.publish()
    trainer.relay.drop(delta_name(offer_of(published[0]).publisher, offer_of(published[0]).serial))
    assert first.bring(published) == whole(published[0])
    published = trainer.publish()
    trainer.relay.close()
    peer = re.escape(trainer.relay.source.peer)
    with pytest.raises(RelayError, match=rf"^policy version 2, tensor layer\.0: .*; {peer}: "):
        first.bring(published)


@pytest.mark.slow
def test_engines_of_one_host_share_the_changes(hosts):
    trainer, (first, *_) = hosts
    first.bring(trainer.publish())
    published = trainer.publish()
    coming = [first.copies.bring(offer_of(published[0]), 2.0, first.threads) for _ in range(3)]  # as the agent does
    assert len({future.result() for future in coming}) == 1
    assert first.copies.num_pulled == whole(published[0]) + changes(published[0])
