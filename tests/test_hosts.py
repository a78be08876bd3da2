"""What travels between hosts, and where things run. Whole runs over several hosts are in test_hosts_rl.py."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from msgspec.structs import replace

from posttrain.actors.losses import ActorLostError
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources, HostChoice, RolloutResources, TrainerResources, WorkerRange
from posttrain.context import BusyLog, StageContext
from posttrain.errors import ConfigError, UserError
from posttrain.files import read_jsonl
from posttrain.hosts import away, placement
from posttrain.hosts.away import HandedOver
from posttrain.hosts.checks import HostReport, compare_hosts, received, report_of_this
from posttrain.hosts.folders import fetch_folder, offer_folder, take_folder
from posttrain.hosts.lease import Lease
from posttrain.hosts.placement import CLUSTER_VARIABLE, NODE_LABEL, RankPlaces, check_choices, chosen, pinned_here
from posttrain.hosts.relay import MAX_SILENCE_S, Relay, RelayError, Source, pull, silence_s
from posttrain.hosts.weights import WeightCopies, WeightsOffer
from posttrain.sampling import client, registry
from posttrain.sampling.client import Engines
from posttrain.sampling.manifests import Road, WeightManifest, from_plain, to_plain
from posttrain.sampling.requests import Updated
from posttrain.sampling.roads import EnginePlace, chained, offer_of
from posttrain.sampling.weights import SharedWeights, TensorSpec, open_weights
from posttrain.sampling.worker import Worker
from posttrain.sampling.worker_weights import UpdateCalls, WorkerWeights

SECRET = "00" * 32
CONTEXT = StageContext("rl", Path("/nonexistent"), Path("/dev/null"))


def source_of(number: int) -> Source:
    return Source(f"10.0.0.{number}", 1000 + number, SECRET, f"process {number}")


# ---------------------------------------------------------------- without a network


def test_each_host_gets_weights_from_the_hosts_before_it_and_at_last_from_the_trainer():
    road = Road("trainer", 1, "node0", (source_of(0),))
    manifest = WeightManifest("/dev/shm/x", 3, 64, "process 0", (), road)
    places = [EnginePlace(f"node{number}", source_of(number)) for number in (1, 1, 2, 0, 3)]
    sources = []
    for place in range(len(places)):
        made = chained(manifest, places[place], places[:place])
        assert isinstance(made, WeightManifest)
        assert made.road is not None
        sources.append([source.peer[-1] for source in made.road.sources])
    # The engine on the trainer's host (0) reads the segment itself, and none of the two on host 1 waits for the other.
    assert sources == [["0"], ["0"], ["1", "0"], ["2", "1", "0"], ["2", "1", "0"]]
    assert from_plain(to_plain(manifest)) == manifest


class Remote:
    """A method of an actor that answers with what `function` returns."""

    def __init__(self, function: Callable[..., Awaitable[Any]]):
        self.remote = function


def worker_on(place: EnginePlace | None, update: Callable[..., Awaitable[Any]]) -> Worker:
    async def pids() -> None:
        pass

    actor = SimpleNamespace(update_weights=Remote(update), pids=Remote(pids))
    log = BusyLog(CONTEXT, "e", "generate")
    return Worker(
        "e", actor, 0, take=lambda *_: None, log=log, deadline_s=1.0, batch_size=None, is_alive=True, place=place
    )


def weights_of(workers: list[Worker], taken: list[Worker]) -> WorkerWeights:
    for seat, worker in enumerate(workers):
        worker.seat = seat

    def calls(manifest: Any, version: int, *, seats: Sequence[int]) -> UpdateCalls:
        return [[(seat, {"source": manifest, "policy_version": version}) for seat in seats]]

    return WorkerWeights(CONTEXT, workers, calls=calls, manifest=None, version=0, taken=taken.append)


def test_an_update_chains_the_hosts_whose_engines_load_it():
    asked: list[list[str]] = []

    async def update(source: WeightManifest, policy_version: int) -> Updated:
        assert source.road is not None
        asked.append([each.peer[-1] for each in source.road.sources])
        return Updated(0.0, 1.0, [])

    manifest = WeightManifest("/dev/shm/x", 3, 64, "process 0", (), Road("trainer", 1, "node0", (source_of(0),)))

    async def run() -> list[int]:
        workers = [worker_on(EnginePlace(f"node{number}", source_of(number)), update) for number in (1, 2, 3, 4)]
        workers[1].is_kept = True  # its host gets the version later, so no other waits for it
        workers[2].is_alive = False
        weights = weights_of(workers, taken := [])
        await weights.update(manifest, 3)
        assert asked == [["0"], ["1", "0"]]
        await weights.release(workers[1])  # now all others that stand have it
        assert sorted(asked[2]) == ["0", "1", "4"]
        assert len(taken) == 3
        return [worker.policy_version for worker in workers]

    assert asyncio.run(run()) == [3, 3, 0, 3]


def test_an_engine_on_a_host_that_does_not_answer_holds_up_no_update():
    async def silent(source: WeightManifest, policy_version: int) -> None:
        await asyncio.Event().wait()

    async def quick(source: WeightManifest, policy_version: int) -> Updated:
        return Updated(0.0, 1.0, [])

    async def run() -> tuple[list[int], BaseException]:
        workers = [worker_on(None, silent), worker_on(None, quick)]
        weights = weights_of(workers, [])
        updating = asyncio.ensure_future(weights.update(WeightManifest("x", 1, 0, "p", ()), 1))
        serving = asyncio.ensure_future(workers[0].lane.guarded(asyncio.Event().wait()))
        await asyncio.sleep(0.05)
        assert not updating.done()
        workers[0].lane.fail(ActorLostError("its host does not answer"))
        await updating
        await weights.settled()  # the trainer may publish again
        (found,) = await asyncio.gather(serving, return_exceptions=True)
        assert isinstance(found, BaseException)
        return [worker.policy_version for worker in workers], found

    versions, found = asyncio.run(run())
    assert versions == [0, 1]
    assert str(found) == "its host does not answer"


def test_a_local_session_tells_ray_nothing_about_hosts(monkeypatch):
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    choice = HostChoice(nodes=["a"], labels={"gpu": "h100"}, spread=True)
    assert chosen(choice, ["x"]) == pinned_here() == {}
    assert RankPlaces(TrainerResources(nodes=["a"], pack=True), 2, ["x"]).options == [{}, {}]


def test_labels_spread_and_hosts_to_avoid_are_told_to_ray(monkeypatch):
    monkeypatch.setenv(CLUSTER_VARIABLE, "1")
    assert chosen(HostChoice()) == {}
    assert chosen(HostChoice(labels={"gpu": "h100"}, spread=True), ["b", "a"]) == {
        "label_selector": {"gpu": "h100", NODE_LABEL: "!in(a,b)"},
        "scheduling_strategy": "SPREAD",
    }


def test_engines_that_are_packed_go_where_others_of_them_are_if_there_is_room(monkeypatch):
    monkeypatch.setenv(CLUSTER_VARIABLE, "1")
    packed = HostChoice(labels={"gpu": "h100"}, pack=True)
    assert chosen(packed, ["dead"], ["b", "a", "dead"]) == {
        "label_selector": {"gpu": "h100", NODE_LABEL: "in(a,b)"},
        "fallback_strategy": [{"label_selector": {"gpu": "h100", NODE_LABEL: "!in(dead)"}}],
    }
    assert chosen(packed, ["dead"], ["dead"]) == {"label_selector": {"gpu": "h100", NODE_LABEL: "!in(dead)"}}
    with pytest.raises(ValueError, match="spread and pack are both true"):
        HostChoice(spread=True, pack=True)


@pytest.mark.parametrize(
    ("resources", "number", "where"),
    [
        (TrainerResources(cpus=1), 2, ["home", "home"]),
        (TrainerResources(cpus=0), 9, ["home"] * 9),
        (TrainerResources(cpus=1), 3, ["!in(silent)"] * 3),  # the home host has two CPUs
        (TrainerResources(cpus=1, gpus=1), 1, ["!in(silent)"]),
        (TrainerResources(cpus=1, labels={"gpu": "h100"}), 1, ["!in(silent)"]),
        (TrainerResources(cpus=1, nodes=["address of a", "b"]), 2, ["in(id of a,id of b)"] * 2),
    ],
)
def test_ranks_are_on_the_home_host_if_it_has_room_for_all_and_they_do_not_say_where(
    resources, number, where, monkeypatch
):
    nodes = [{**node(name, cpus), "NodeID": f"id of {name}"} for name, cpus in (("home", 2), ("a", 4), ("b", 4))]
    monkeypatch.setenv(CLUSTER_VARIABLE, "1")
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(placement, "this_node", lambda: "id of home")
    monkeypatch.setattr(placement, "pinned", lambda node: {"label_selector": {NODE_LABEL: node.removeprefix("id of ")}})
    places = RankPlaces(resources, number, ["silent"])
    assert [options["label_selector"][NODE_LABEL] for options in places.options] == where


def node(name: str, cpus: float, **labels: str) -> dict:
    resources = {"CPU": cpus} if cpus else {}
    return {"NodeManagerHostname": name, "NodeManagerAddress": f"address of {name}", "Labels": labels, "Alive": True,
            "Resources": resources}  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            ActorResources(workers=3, cpus=2),
            "asks for 3 × (2 CPU), each on one host, and of the hosts that it may use home has 1 CPU; a has 3 CPU; "
            "b has 2 CPU; 2 would fit: lower workers",
        ),
        (ActorResources(workers=1, cpus=4), "none would fit: lower what each asks for"),
        (RolloutResources(workers=WorkerRange(min=2, max=9), cpus=2, nodes=["a"]), "has 3 CPU; 1 would fit"),
        (RolloutResources(workers=2, cpus=1, labels={"role": "engine"}), None),
        (RolloutResources(workers=WorkerRange(min=2, max=9), cpus=2), None),
        (ActorResources(workers=2, cpus=0.5, nodes=["address of home"]), None),
        (ActorResources(workers=1, cpus=0, gpus=1), "asks for 1 × (1 GPU)"),
        (ActorResources(workers=9, cpus=0), None),
        (HostChoice(labels={"role": "engine"}), None),
        (HostChoice(labels={"gpu": "h100"}), "labels: no host has gpu=h100; labels are given to a host by `ray start"),
        (HostChoice(nodes=["a", "c"]), "nodes: got 'c', which is no host of the cluster; it has a, b, home"),
        (TrainerResources(cpus=3), "asks for 2 × (3 CPU), each on one host, and of the hosts that it may use home has"),
        (TrainerResources(cpus=3), "1 would fit: lower parallel.processes"),
        (TrainerResources(cpus=2), None),
    ],
)
def test_actors_that_no_host_has_room_for_are_refused(choice, message, monkeypatch):
    """Five CPUs in all, but an actor is on one host."""
    nodes = [node("home", 1), node("a", 3, role="engine"), node("b", 2)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    choices, ranks = {"resources.rollout": choice}, {"resources.rollout": 2}
    if message is None:
        check_choices(choices, ranks)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_choices(choices, ranks)


@pytest.mark.parametrize(
    ("choice", "idle", "number"),
    [
        (ActorResources(cpus=1), [], 1 + 2),  # b does not answer
        (ActorResources(cpus=1.5), [], 1),  # three CPUs in all, but each engine is on one host
        (ActorResources(cpus=1.5), [("id of home", 0.5, 0.0)], 2),
        (ActorResources(cpus=1, labels={"role": "engine"}), [], 2),
        (ActorResources(cpus=1, nodes=["home"]), [], 1),
        (ActorResources(cpus=1, gpus=1), [], 0),
        (ActorResources(cpus=0), [], 9),
    ],
)
def test_room_is_counted_on_the_hosts_that_an_engine_may_use(choice, idle, number, monkeypatch):
    monkeypatch.setenv(CLUSTER_VARIABLE, "1")
    nodes = [node("home", 2), node("a", 3, role="engine"), node("b", 8)]
    monkeypatch.setattr(
        ray, "nodes", lambda: [{**each, "NodeID": f"id of {each['NodeManagerHostname']}"} for each in nodes]
    )
    free = {"id of home": {"CPU": 1.0}, "id of a": {"CPU": 2.0}, "id of b": {"CPU": 8.0}}
    monkeypatch.setattr(placement, "free_resources", lambda: {name: dict(has) for name, has in free.items()})
    assert placement.room(choice, 9, ["id of b"], idle=idle) == number


@pytest.mark.parametrize(("on_cluster", "has_place", "kept"), [(True, False, 0), (True, True, 1), (False, False, 1)])
def test_no_engine_stays_warm_while_another_waits_for_its_host(on_cluster, has_place, kept, monkeypatch):
    monkeypatch.setattr(registry, "directory", lambda: SimpleNamespace() if on_cluster else None)
    engines = registry.EngineRegistry()

    async def end(ended) -> None:
        for held in ended:
            engines._held.remove(held)

    monkeypatch.setattr(engines, "_end", end)

    async def release() -> list[str]:
        for name, stage in (("engine-0", "evaluation"), ("engine-1", "rl")):
            where: Any = asyncio.get_running_loop().create_future()
            if has_place or name == "engine-0":
                where.set_result(("node", 1))
            engines._held.append(registry._Held(name, "", None, where, stage, {}, {}, ActorResources()))
        await engines.release(["engine-0"], keep=True)
        return [held.name for held in engines._held if held.stage is None]

    assert len(asyncio.run(release())) == kept


def test_a_host_with_another_package_or_clock_is_named():
    home = report_of_this()
    assert all(home.packages.values()), home  # the tests are run where everything is installed
    assert "+" not in home.packages["torch"]
    twin = {**home.packages, "trl": ""}  # only trainers need it
    compare_hosts(home, [HostReport("twin", twin, home.clock, 5.0)])
    odd = {**home.packages, "torch": "1.0", "ray": ""}
    with pytest.raises(UserError) as error:
        compare_hosts(
            home, [HostReport("w1", odd, home.clock), received(HostReport("w2", home.packages, time.time() - 7200))]
        )
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["host w1", "host w1", "host w2"]
    assert "ray is not installed" in lines[0]
    assert f"torch is 1.0, and on {home.host}" in lines[1]
    assert "s behind that of" in lines[2]


def test_a_reader_further_down_a_chain_is_more_patient_so_that_the_first_behind_a_loss_goes_on_first():
    patience = [silence_s(sources) for sources in range(1, 20)]
    assert patience == sorted(patience)
    assert patience[0] < patience[1] < patience[2]
    assert patience[-1] == MAX_SILENCE_S


# ---------------------------------------------------------------- over a network


@pytest.fixture
def relays() -> Iterator[list[Relay]]:
    made = [Relay("127.0.0.1") for _ in range(3)]
    yield made
    for relay in made:
        relay.close()


def publish(relay: Relay, folder: Path, version: int, weights: SharedWeights | None = None) -> tuple[Any, ...]:
    """(publisher, manifest, tensors): some tensors of a version, which are several steps of a relay long."""
    torch.manual_seed(version)
    tensors = {f"layer.{index}": torch.randn(1 << 20) for index in range(5)}
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    weights = weights or SharedWeights(folder, relay, "trainer-node")
    return weights, weights.publish(specs, tensors.values(), version), tensors


def assert_brought(path: str, manifest: WeightManifest, tensors: dict[str, torch.Tensor]) -> None:
    from msgspec.structs import replace

    found = dict(open_weights(replace(manifest, path=path, road=None)))
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def offer_from(manifest: WeightManifest, *sources: Source) -> WeightsOffer:
    return replace(offer_of(manifest), sources=sources)


@pytest.mark.slow
def test_versions_go_through_a_chain_of_hosts_once_each(relays, tmp_path):
    trainer, first, second = relays
    copies = [WeightCopies(first), WeightCopies(second)]
    weights = None
    with ThreadPoolExecutor(4) as threads:
        for version in (0, 0, 1, 2):  # a version may be published again, with other values
            weights, manifest, tensors = publish(trainer, tmp_path, version, weights)
            chain = [(trainer.source,), (first.source, trainer.source)]
            coming = [
                copy.bring(offer_from(manifest, *sources), 10.0, threads)
                for copy, sources in zip(copies, chain, strict=True)
            ]
            again = copies[1].bring(offer_from(manifest, trainer.source), 10.0, threads)
            assert again is coming[1]  # a second engine of the host
            for one in coming:
                assert_brought(one.result(), manifest, tensors)
    weights.close()


@pytest.mark.slow
def test_a_reader_goes_on_at_the_same_byte_when_the_host_before_it_is_gone(relays, tmp_path):
    trainer, middle, _ = relays
    weights, manifest, _ = publish(trainer, tmp_path, 0)
    offer = offer_from(manifest, middle.source, trainer.source)
    half = offer.num_bytes // 2 + 12345
    descriptor = os.open(manifest.path, os.O_RDONLY)
    middle.hold(offer.served_name, descriptor, offer.num_bytes, have=half)  # and never more
    asked = []
    grown = threading.Event()
    place = memoryview(bytearray(offer.num_bytes))

    def grew(have: int) -> None:
        asked.append(have)
        grown.set()

    left = pull(offer.served_name, place, offer.sources, deadline_s=20.0, grew=grew)
    assert len(left) == 1
    assert middle.source.peer in left[0]
    assert half in asked  # the first source gave so much, and the second began there
    assert asked == sorted(asked)
    with open(manifest.path, "rb") as segment:
        assert segment.read() == bytes(place)
    os.close(descriptor)
    weights.close()


@pytest.mark.slow
def test_a_tensor_that_arrives_damaged_is_read_again_from_another_host(relays, tmp_path):
    trainer, broken, last = relays
    weights, manifest, tensors = publish(trainer, tmp_path, 0)
    offer = offer_from(manifest, broken.source, trainer.source)
    damaged = bytearray(Path(manifest.path).read_bytes())
    damaged[manifest.tensors[3].offset + 100] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    descriptor = os.open(tmp_path / "damaged", os.O_RDONLY)
    broken.hold(offer.served_name, descriptor, len(damaged))
    with ThreadPoolExecutor(1) as threads:
        path = WeightCopies(last).bring(offer, 20.0, threads).result()
        assert_brought(path, manifest, tensors)
        only = offer_from(manifest, replace(broken.source, peer="process 7 on broken"))
        relay = Relay("127.0.0.1")
        told = r"^policy version 0, tensor layer\.3: .*; process 7 on broken: tensor layer\.3 arrived damaged$"
        with pytest.raises(RelayError, match=told):
            WeightCopies(relay).bring(only, 0.5, threads).result()
        relay.close()
    os.close(descriptor)
    weights.close()


@pytest.mark.slow
def test_nothing_is_served_without_the_secret_nor_under_a_name_that_was_overwritten(relays, tmp_path):
    trainer = relays[0]
    weights, manifest, _ = publish(trainer, tmp_path, 0)
    offer = offer_of(manifest)
    place = memoryview(bytearray(offer.num_bytes))
    source = trainer.source
    stranger = Source(source.address, source.port, SECRET, "stranger")
    with pytest.raises(RelayError, match=f"0 of {offer.num_bytes} bytes arrived, .*; stranger: "):
        pull(offer.served_name, place, [stranger], deadline_s=0.3)
    for version in (1, 2):  # the second lies where version 0 was
        publish(trainer, tmp_path, version, weights)
    with pytest.raises(RelayError, match=f"0 of {offer.num_bytes} bytes arrived, .*; {re.escape(source.peer)}: "):
        pull(offer.served_name, place, [source], deadline_s=0.3)
    assert not any(place)
    weights.close()


@pytest.mark.slow
def test_a_folder_reaches_a_host_once_by_its_content(relays, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "deep" / "weights").write_bytes(os.urandom(9_000_000))
    offer = offer_folder(folder, relays[0])
    here = fetch_folder(offer, 5.0)
    assert {path.relative_to(here): path.read_bytes() for path in here.rglob("*") if path.is_file()} == {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    relays[0].close()
    assert fetch_folder(offer, 0.3) == here  # nothing is asked for
    (folder / "config.json").write_text('{"other": 1}')
    changed = offer_folder(folder, relays[1])
    assert fetch_folder(changed, 5.0) != here
    assert (fetch_folder(offer, 0.3) / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_a_full_disk_is_found_before_anything_is_pulled(relays, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "weights").open("wb") as file:
        file.write(b"x")
    offer = offer_folder(tmp_path / "model", relays[0])
    from msgspec.structs import replace

    huge = replace(offer, files=(replace(offer.files[0], num_bytes=1 << 60),))
    with pytest.raises(UserError, match=r"host .*: .*cache/models has .* GB free, and the model .*/model has"):
        fetch_folder(huge, 5.0)


# ---------------------------------------------------------------- an engine that finds no host, or loses it


def answering(value: object) -> Remote:
    async def answer(*_: object) -> object:
        return value

    return Remote(answer)


async def never(*_: object) -> None:
    await asyncio.Event().wait()


def leased(tmp_path: Path, *started: bool) -> Engines:
    """Engines of a stage, of which some have started."""
    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")
    model = ServedModelConfig(path="policy", dtype="float32")
    engines = Engines(context, model, EngineConfig(), resources=ActorResources(workers=len(started)))
    engines.names = [f"engine-{index}" for index in range(len(started))]
    engines._unstarted = {name for name, is_started in zip(engines.names, started, strict=True) if not is_started}
    return engines


@pytest.mark.parametrize("others_work", [True, False])
def test_a_replacement_without_room_says_so_and_waits_only_while_another_engine_works(
    others_work, tmp_path, monkeypatch
):
    monkeypatch.setattr(client, "NOTICE_S", 0.01)
    monkeypatch.setattr(client, "PLACE_S", 0.02)
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    engines = leased(tmp_path, False, others_work)
    engines.actors = [SimpleNamespace(where=Remote(never)), None]

    async def replace() -> None:
        waiting = asyncio.ensure_future(engines._start_replacement(0, "engine-0 did not start"))
        await asyncio.wait({waiting}, timeout=0.2)
        assert waiting.done() != others_work
        engines._unstarted = set(engines.names)  # the last engine that worked is lost
        await waiting

    with pytest.raises(TimeoutError, match="no host had room for it"):
        asyncio.run(replace())
    [event] = read_jsonl(tmp_path / "events.jsonl")
    assert (event["event"], event["name"], event["num_left"]) == ("engine_unplaced", "engine-0", int(others_work))


def test_a_replacement_without_room_is_placed_anew_when_a_host_answers_again(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "NOTICE_S", 0.01)
    avoided = {"silent", "dead"}

    async def now() -> frozenset[str]:
        return frozenset(avoided)

    monkeypatch.setattr(client, "_avoided", now)
    engines = leased(tmp_path, False, True)
    engines.actors = [SimpleNamespace(where=Remote(never)), None]
    placed = SimpleNamespace(where=Remote(never))
    made: list[str] = []

    async def replace(name: str) -> tuple[str, Any]:
        made.append(name)
        return f"engine-{9 + len(made)}", placed

    engines._registry = SimpleNamespace(replace=Remote(replace))

    async def run() -> None:
        replacing = asyncio.ensure_future(engines.replace(0, ActorLostError("its host does not answer")))
        for host, number in (("later", 1), ("silent", 2), ("dead", 3)):
            avoided.symmetric_difference_update({host})  # `later` is suspected meanwhile, which gives no room
            await asyncio.wait({replacing}, timeout=0.3)
            assert len(made) == number
        replacing.cancel()

    asyncio.run(run())
    assert made == ["engine-0", "engine-10", "engine-11"]


def test_an_engine_whose_host_is_suspected_while_it_starts_is_lost_before_ray_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "SUSPICION_S", 0.01)
    hosts = SimpleNamespace(avoided=answering(frozenset({"silent"})))
    monkeypatch.setattr(client, "directory", lambda: hosts)
    engines = leased(tmp_path, False)

    async def start(node: str, answer: Remote) -> None:
        await engines._await_start(answer.remote(), EnginePlace(node, None), "engine-0 did not start")

    with pytest.raises(ActorLostError, match="its host does not answer"):
        asyncio.run(start("silent", Remote(never)))
    asyncio.run(start("heard", answering(None)))


# ---------------------------------------------------------------- the lease of engines on other hosts


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        return process.wait(seconds) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.slow
def test_engines_end_when_the_home_host_is_not_heard_and_not_before():
    lease = Lease(lease_s=2.0, look_s=0.05)
    engines = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    try:
        for engine in engines:
            lease.enroll(engine.pid)
        for _ in range(30):  # longer than a lease
            time.sleep(0.1)
            lease.renew()
        assert [engine.poll() for engine in engines] == [None, None]
        assert all(ends_within(engine, 60.0) for engine in engines)
        late = subprocess.Popen(["sleep", "600"])
        engines.append(late)
        lease.enroll(late.pid)  # of a run that began after the host was heard again
        assert not ends_within(late, 0.5)
        assert ends_within(late, 60.0)
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()


# ---------------------------------------------------------------- what is left of a process that was killed

LEAVING = """
import os, sys
from posttrain.hosts.afterwards import remove_afterwards
remove_afterwards(f"{sys.argv[1]}/segment-*")
open(f"{sys.argv[1]}/segment-a", "w").close()
print("made", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_what_a_process_leaves_is_removed_however_it_ends(tmp_path, end):
    (tmp_path / "other").touch()
    command = [sys.executable, "-c", LEAVING, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    assert process.stdout.readline() == "made\n"
    assert (tmp_path / "segment-a").exists()
    if end is not None:
        process.send_signal(end)
    process.communicate()
    until = time.monotonic() + 60.0
    while (tmp_path / "segment-a").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# ---------------------------------------------------------------- what ranks on other hosts hand over


def handed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HandedOver:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(away, "this_address", lambda: "127.0.0.1")
    return HandedOver()


@pytest.mark.slow
def test_what_a_rank_has_written_is_taken_whole_or_not_at_all(tmp_path, monkeypatch):
    hand = handed(monkeypatch, tmp_path)
    target = tmp_path / "home" / "step_3"
    for number in (1, 2):
        place = hand.begin("step_3")
        place.mkdir()
        (place / "weights").write_bytes(bytes([number]) * 9_000_000)
        (place / f"only-{number}").write_text("x")
        offer = hand.offer(place)
        take_folder(offer, target, 5.0)
        assert (target / "weights").read_bytes() == bytes([number]) * 9_000_000
        assert sorted(path.name for path in target.iterdir()) == [f"only-{number}", "weights"]
    hand.close()  # the rank is gone
    with pytest.raises(RelayError):
        take_folder(offer, target, 0.3)
    assert (target / "weights").read_bytes() == bytes([2]) * 9_000_000
    assert [path.name for path in target.parent.iterdir()] == ["step_3"]


@pytest.mark.slow
def test_a_rank_keeps_one_folder_at_a_time_and_deletes_those_of_ranks_that_were_killed(tmp_path, monkeypatch):
    hand = handed(monkeypatch, tmp_path)
    first = hand.begin("model")
    first.mkdir()
    hand.offer(first)
    killed = first.parent.parent / "killed"
    (killed / "step_1").mkdir(parents=True)
    other = handed(monkeypatch, tmp_path)
    assert not killed.exists()
    assert first.exists()  # its process lives
    second = hand.begin("model")
    assert not first.parent.exists()
    assert second.parent.exists()
    hand.close()
    other.close()
    assert not list(second.parent.parent.iterdir())
