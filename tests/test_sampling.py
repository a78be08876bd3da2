"""Real vLLM engines in Ray actors: swapped weights equal a fresh load, in flight too; the transfer is checksummed."""

import asyncio
import signal
import subprocess
import sys

import pytest
import tiny_policy
import torch

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.sampling.manifests import FolderWeights, GpuManifest, from_plain, to_plain
from posttrain.sampling.requests import EngineLostError, SampleRequest
from posttrain.sampling.weights import SharedWeights, TensorSpec, WeightTransferError, open_weights, verify

ENGINE = EngineConfig(**tiny_policy.ENGINE)
PROMPTS = [tuple(range(5 + i, 25 + i)) for i in range(12)]
GREEDY = [SampleRequest(prompt, temperature=0.0, max_tokens=24) for prompt in PROMPTS]


# ---------------------------------------------------------------- the way of the weights


def publish(shared, named, version):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]
    return shared.publish(specs, named.values(), version)


def test_published_weights_arrive_exactly(tmp_path):
    sent = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "experts": torch.randn(2, 3, 5),
        "none": torch.zeros(0, 3, 2),
    }
    shared = SharedWeights(tmp_path)
    manifest = publish(shared, sent, 3)
    received = dict(open_weights(manifest))
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    shared.close()
    assert not list(tmp_path.iterdir())


def test_next_version_does_not_overwrite_what_is_being_read(tmp_path):
    shared = SharedWeights(tmp_path)
    first = publish(shared, {"w": torch.full((1000,), 1.0)}, 1)
    reading = dict(open_weights(first))
    publish(shared, {"w": torch.full((1000,), 2.0)}, 2)
    assert torch.equal(reading["w"], torch.full((1000,), 1.0))


@pytest.mark.slow
def test_what_a_killed_publisher_left_is_removed_by_the_next(tmp_path):
    script = f"""
import os, signal, torch
from posttrain.sampling.weights import SharedWeights, TensorSpec
shared = SharedWeights({str(tmp_path)!r})
for version in (1, 2):
    shared.publish([TensorSpec("w", torch.float32, (9,))], [torch.ones(9)], version)
os.kill(os.getpid(), signal.SIGKILL)
"""
    alive = SharedWeights(tmp_path)
    manifest = publish(alive, {"w": torch.ones(3)}, 1)
    ended = subprocess.run([sys.executable, "-c", script])
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    SharedWeights(tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [manifest.path]
    assert dict(open_weights(manifest))["w"].equal(torch.ones(3))


def test_damaged_weights_are_refused(tmp_path):
    shared = SharedWeights(tmp_path)
    manifest = publish(shared, {"w": torch.ones(1000)}, 5)
    with open(manifest.path, "r+b") as segment:
        segment.seek(400)
        segment.write(b"\xff")
    with pytest.raises(WeightTransferError, match=r"policy version 5 from process \d+ on .*: tensor w has checksum"):
        verify(manifest)
    shared.close()
    for read in (verify, lambda manifest: list(open_weights(manifest))):
        with pytest.raises(WeightTransferError, match="is gone"):
            read(manifest)


def test_the_tensor_that_differs_is_named(tmp_path):
    shared = SharedWeights(tmp_path)
    manifest = publish(shared, {"a": torch.ones(100), "b": torch.ones(100), "c": torch.ones(100)}, 6)
    with open(manifest.path, "r+b") as segment:
        segment.seek(manifest.tensors[1].offset + 8)
        segment.write(b"\xff")
    notes = []
    with pytest.raises(WeightTransferError, match="tensor b has checksum"):
        verify(manifest, notes.append)
    assert notes == ["the checksum of tensor a", "the checksum of tensor b"]


@pytest.mark.slow
def test_the_stack_of_a_frozen_process_can_be_read():
    import os
    import signal
    import subprocess
    import sys

    from posttrain.sampling.progress import Progress

    progress = Progress.create()
    code = (
        "import os, signal, sys; from posttrain.sampling.progress import Progress; p = Progress(sys.argv[1]); "
        "p.note('tensor one, which has a long name'); p.note('tensor two'); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, progress.path])
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert progress.read() == (2, "tensor two")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        progress.give_up()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"backend": "nccl"}}, "resources.rollout.gpus is 0"),
        ({"weights": {"backend": "ipc"}, "resources": {"rollout": {"gpus": 1}}}, "resources.trainer.gpus is 0"),
        (
            {"weights": {"backend": "ipc"}, "resources": {"rollout": {"gpus": 1}, "trainer": {"gpus": 1}}},
            r"one engine on the trainer's own GPU.*\(1\) and trainer \(1\)",
        ),
        (
            {
                "weights": {"backend": "ipc"},
                "resources": {"rollout": {"gpus": 0.5}, "trainer": {"gpus": 0.5}},
                "parallel": {"processes": 2},
            },
            "parallel.processes 1, got 2",
        ),
        (
            {
                "weights": {"backend": "nccl", "order": "one_by_one"},
                "resources": {"rollout": {"workers": 2, "gpus": 1}, "trainer": {"gpus": 1}},
            },
            "a broadcast to all",
        ),
    ],
)
def test_a_backend_that_cannot_work_is_refused(changes, message):
    from posttrain.config.base import validate_config
    from posttrain.errors import ConfigError
    from posttrain.rl.config import RlConfig

    base = {"model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "reward": {"name": "math"}}
    with pytest.raises(ConfigError, match=message) as error:
        validate_config(RlConfig, {**base, **changes}, "rl.yaml")
    assert error.value.exit_code == 2


# ---------------------------------------------------------------- vLLM's own backends, which need GPUs to run

NAMED = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16)}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in NAMED.items()]


def contract(function):
    """vLLM takes seconds to import."""
    return pytest.mark.slow(pytest.mark.timeout(120)(function))


@contract
def test_nccl_manifests_are_what_vllm_takes():
    import json
    from dataclasses import asdict

    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_common import NCCLRendezvous, worker_init_payload
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferEngine,
    )

    from posttrain.sampling.manifests import source_for
    from posttrain.sampling.transfer import GpuWeights, _Client, _source, open_update

    weights = GpuWeights("nccl", 5, 1.0)
    info = weights.init_info()
    assert isinstance(info, NCCLTrainerInitInfo)
    assert info.is_sender
    assert NCCLRendezvous.__annotations__.keys() <= asdict(info).keys()
    assert WeightTransferTrainerFactory._registry[info.backend]() is NCCLTrainerWeightTransferEngine
    assert WeightTransferEngineFactory._registry["nccl"]() is NCCLWeightTransferEngine
    assert isinstance(_Client(), VLLMWeightSyncClient)
    manifest = GpuManifest("nccl", 3, "trainer", weights.manifest_init(), weights.update_names(SPECS))
    source = source_for(manifest, 1, 2)
    source = from_plain(json.loads(json.dumps(to_plain(source))))
    assert isinstance(source, GpuManifest)
    worker = object.__new__(NCCLWeightTransferEngine)  # its constructor needs a model; parsing does not
    init = worker.parse_init_info(source.init)
    assert init.rank_offset == 3  # the trainer, then two GPUs of the first engine
    assert worker_init_payload(init).items() >= source.init.items()
    update = worker.parse_update_info(open_update(source))
    assert update.names == list(NAMED)
    assert update.shapes == [[3, 5], [7]]
    weights.hold(SPECS, NAMED.values())
    offered = _source(weights)
    sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(offered, offered.metadata()))
    assert all(torch.equal(sent[name], tensor) for name, tensor in NAMED.items())
    assert [str(meta.dtype).removeprefix("torch.") for meta in offered.metadata()] == update.dtype_names


@contract
def test_ipc_manifests_are_what_vllm_takes():
    """vLLM's own sending code makes the handles, of CPU tensors here; they come through as they were sent."""
    import json
    import threading

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
        IPCWeightTransferEngine,
    )

    from posttrain.sampling.transfer import GpuWeights, _source, open_update

    weights = GpuWeights("ipc", 2, 30.0)
    info = weights.init_info()
    assert isinstance(info, IPCTrainerInitInfo)
    assert WeightTransferTrainerFactory._registry[info.backend]() is IPCTrainerWeightTransferEngine
    assert WeightTransferEngineFactory._registry["ipc"]() is IPCWeightTransferEngine
    weights.hold(SPECS, NAMED.values())
    sender = object.__new__(IPCTrainerWeightTransferEngine)  # its constructor asks for a GPU
    sender.client, sender.is_sender, sender.gpu_uuid = weights.client, True, "GPU-0"
    thread = threading.Thread(target=sender._send_unpacked, args=(_source(weights),), daemon=True)
    thread.start()
    manifest = GpuManifest("ipc", 3, "trainer", weights.manifest_init(), weights.handles())
    weights.client.taken.set()
    thread.join(30)
    source = from_plain(json.loads(json.dumps(to_plain(manifest))))
    assert isinstance(source, GpuManifest)
    worker = object.__new__(IPCWeightTransferEngine)
    assert worker.parse_init_info(source.init).packed is info.packed
    update = worker.parse_update_info(open_update(source))
    assert update.names == list(NAMED)
    assert [list(handle) for handle in update.ipc_handles] == [["GPU-0"], ["GPU-0"]]


@contract
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's sender works where there is a GPU")
def test_a_failed_sender_is_told_with_peer_and_version():
    """There is no GPU here, so vLLM's sender fails; without a sender's answer the wait has an end as well."""
    from posttrain.sampling.transfer import GpuWeights

    weights = GpuWeights("ipc", 2, 30.0)
    with pytest.raises(WeightTransferError, match=r"policy version 4 from process \d+ on .* by ipc: "):
        weights.publish(SPECS, NAMED.values(), 4)
    weights.close()


# ---------------------------------------------------------------- real engines


def other_model(tiny_model, tmp_path_factory):
    """The same architecture with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    changed = {name: tensor + 0.3 * torch.randn_like(tensor) * tensor.std() for name, tensor in weights.items()}
    save_file({k: v.contiguous() for k, v in changed.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return [
        ServedModelConfig(path=str(path), dtype="float32")
        for path in (tiny_model, other_model(tiny_model, tmp_path_factory))
    ]


def context_in(folder, name, warm=True):
    return StageContext(name, folder, folder / "events.jsonl", warm_engines=warm)


def replies(engines):
    """One request at a time: sums then have one order, and equal weights give equal bits."""
    import ray

    (actor,) = engines.actors
    waves = [ray.get(actor.generate_wave.remote([request], 0))[0] for request in GREEDY]
    return [(reply.token_ids, reply.logprobs) for ((reply,),) in waves]


@pytest.mark.slow
def test_choices_are_renormalised(ray_session, models, tmp_path):
    import math

    import ray

    from posttrain.sampling.client import Engines

    requests = [(key, SampleRequest(p, max_tokens=1, choice_ids=(30, 40, 50))) for key, p in enumerate(PROMPTS)]
    pieces = {}
    with Engines(context_in(tmp_path, "test"), models[0], ENGINE, resources=ActorResources(cpus=0.5)) as engines:
        ray.get(engines.actors[0].submit.remote(requests))
        while len(pieces) < len(PROMPTS):
            pieces |= {piece.key: piece for piece in ray.get(engines.actors[0].collect.remote(1.0))[0]}
    for piece in pieces.values():
        assert set(piece.choice_logprobs) == {30, 40, 50}
        (token,) = piece.token_ids
        assert piece.logprobs == (piece.choice_logprobs[token],)
        assert sum(map(math.exp, piece.choice_logprobs.values())) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_warm_engine_with_swapped_weights_equals_a_fresh_one(ray_session, models, tmp_path):
    from posttrain.sampling.client import Engines

    first, second = models
    resources = ActorResources(cpus=0.5)
    seen, names = [], set()
    for model in (first, second, first, second):
        with Engines(context_in(tmp_path, "test"), model, ENGINE, resources=resources) as engines:
            seen.append(replies(engines))
            names.update(engines.names)
    assert len(names) == 1  # one engine served all four
    other_shape = ENGINE.model_copy(update={"max_num_seqs": 128})
    with Engines(context_in(tmp_path, "test", warm=False), second, other_shape, resources=resources) as fresh:
        assert not names & set(fresh.names)
        freshly_loaded = replies(fresh)
    assert seen[0] == seen[2]
    assert seen[1] == seen[3] == freshly_loaded
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_reload_repair_is_needed_and_sufficient(ray_session, models, tmp_path):
    """Without the repair the same weights, loaded again, give other log-probabilities: the upstream fault is real.

    At last the engine gets damaged weights, and says what, from whom and when.
    """
    import ray

    from posttrain.sampling.arguments import ENGINE_ENV
    from posttrain.sampling.engine import EngineActor

    model = models[0]
    env = {**ENGINE_ENV, "POSTTRAIN_WITHOUT_RELOAD_REPAIR": "1"}
    actor = (
        ray.remote(EngineActor)
        .options(num_cpus=0.5, max_concurrency=100, runtime_env={"env_vars": env})
        .remote("unrepaired", model.model_dump(), ENGINE.model_dump())
    )
    try:
        ray.get(actor.start.remote())
        before, _, _ = ray.get(actor.generate_wave.remote(GREEDY, 0))
        ray.get(actor.update_weights.remote(FolderWeights(model.path), 1))
        after, _, _ = ray.get(actor.generate_wave.remote(GREEDY, 0))
        damaged = publish(SharedWeights(tmp_path), {"a": torch.ones(9), "w": torch.ones(9)}, 2)
        with open(damaged.path, "r+b") as segment:
            segment.seek(damaged.tensors[1].offset)
            segment.write(b"\xff")
        where = "engine unrepaired, policy version 1: the update to policy version 2, at the checksum of tensor w"
        with pytest.raises(EngineLostError, match=f"{where}, failed.* tensor w has checksum"):
            ray.get(actor.update_weights.remote(damaged, 2))
    finally:
        ray.kill(actor)
    gap = max(
        abs(a - b)
        for x, y in zip(before, after, strict=True)
        for a, b in zip(x[0].logprobs, y[0].logprobs, strict=False)
    )
    assert gap > 0.01, "vLLM packs reloaded experts now: remove repack_experts_on_reload"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_stages_at_the_same_time_never_lease_one_engine(ray_session, models):
    """One engine is warm and another shape is idle, which the first caller ends: the second comes in meanwhile.

    The registry, its asyncio and the Ray actors are real; the engines in them are never started.
    """
    from posttrain.sampling.registry import EngineRegistry

    model = models[0].model_dump()
    other_shape = ENGINE.model_copy(update={"max_num_seqs": 128})

    def acquire(registry, stage, engine=ENGINE, workers=2):
        resources = ActorResources(cpus=0.1, workers=workers)
        return registry.acquire(stage, model, engine.model_dump(), resources=resources.model_dump())

    async def lease():
        registry = EngineRegistry()
        try:
            idle = [await acquire(registry, "before", engine, workers=1) for engine in (ENGINE, other_shape)]
            await registry.release([name for ((name, _, _),) in idle], keep=True)
            return await asyncio.gather(*(acquire(registry, stage) for stage in ("one", "two")))
        finally:
            await registry.end_all()

    leases = asyncio.run(lease())
    assert sorted(is_new for lease in leases for _, _, is_new in lease) == [False, True, True, True]
    assert len({name for lease in leases for name, _, _ in lease}) == 4
