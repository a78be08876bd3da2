"""Weights for engines on other hosts than the one that has them: the order of the hosts, and what each engine reads.

    trainer ──► host of engine 0 ──► host of engine 1 ──► ...     `chained` gives each engine the hosts before its own
                                                                  `reachable` gives an engine what it can open by path

A host gets each version once, however many engines it has, and before any of them is paused.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from posttrain.hosts.directory import directory, folder_here
from posttrain.hosts.placement import this_node
from posttrain.hosts.relay import Source
from posttrain.hosts.weights import WeightsOffer
from posttrain.sampling.manifests import FolderWeights, Manifest, WeightManifest, WeightSource, placed


class EnginePlace(msgspec.Struct, frozen=True):
    """Where an engine runs. node: the id of its host's node in Ray. relay: its host's; None in a local session."""

    node: str
    relay: Source | None


async def place_of(actor: Any) -> EnginePlace:
    """Where the actor of an engine runs."""
    node, _ = await actor.where.remote()
    hosts = directory()
    return EnginePlace(node, await (await hosts.agent.remote(node)).source.remote() if hosts is not None else None)


def chained(manifest: Manifest, place: EnginePlace, others: Iterable[EnginePlace]) -> Manifest:
    """The manifest for an engine at `place`. others: the places of the engines before it in the chain, in its order."""
    if not isinstance(manifest, WeightManifest) or manifest.road is None:
        return manifest
    before: Mapping[str, Source] = {
        other.node: other.relay
        for other in others
        if other.relay is not None and other.node not in (place.node, manifest.road.node)
    }
    sources = (*reversed(before.values()), *manifest.road.sources)
    return replace(manifest, road=replace(manifest.road, sources=sources))


async def reachable(source: WeightSource, deadline_s: float) -> WeightSource:
    """The weights as a process on this host opens them by path. They are brought here if they are elsewhere.

    Raises RelayError, which names peer, version and tensor, if no byte arrives for `deadline_s`.
    """
    from ray.exceptions import RayTaskError

    if isinstance(source, FolderWeights):
        return FolderWeights(await folder_here(source.folder, deadline_s))
    if not isinstance(source, WeightManifest) or source.road is None:
        return source
    node = this_node()
    if node == source.road.node:
        return replace(source, road=None)
    agent = await directory().agent.remote(node)
    try:
        return replace(source, path=await agent.bring.remote(offer_of(source), deadline_s), road=None)
    except RayTaskError as error:
        raise error.cause from None


def offer_of(manifest: WeightManifest) -> WeightsOffer:
    """What another host needs to know to get a version that has a road."""
    road = manifest.road
    assert road is not None
    tensors = placed(manifest.tensors)
    return WeightsOffer(
        road.publisher, road.serial, manifest.policy_version, manifest.num_bytes, tensors, road.sources, road.delta
    )
