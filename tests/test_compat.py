"""Patches of upstream libraries: each has a true record, and upstream still has the fault or the gap it is for.

A test named `test_LIBRARY_still_...` runs the library without our patch. When it fails after an upgrade, upstream has
been mended: delete the patch together with the test.
"""

import ast
import inspect
import json
import os
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import posttrain
from posttrain.compat import PATCHES, changed_versions
from posttrain.compat.__main__ import page
from posttrain.compat.ray import free_resources

PACKAGE = Path(posttrain.__file__).parent
ROOT = PACKAGE.parent


NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def defined(tree: ast.Module) -> set[str]:
    """Dotted names of the functions, classes and methods of a module."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, NAMED):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, NAMED)}
    return names


@pytest.mark.parametrize("where", sorted(PATCHES))
def test_a_record_names_code_and_a_test_that_exist(where):
    item = PATCHES[where]
    parts = where.split(".")
    file = next(
        path for n in range(len(parts), 0, -1) if (path := ROOT.joinpath(*parts[:n]).with_suffix(".py")).exists()
    )
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    assert where.removeprefix(f"{module}.") in defined(ast.parse(file.read_text()))
    test_file, _, test = item.test.partition("::")
    assert test in defined(ast.parse((ROOT / test_file).read_text())), f"{item.test} is not there; name another test"
    assert item.kind in ("fault", "gap")
    assert len(item.reason) > 40
    assert item.reference


def test_patches_were_checked_against_the_installed_versions():
    assert changed_versions() == []


def test_another_version_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "posttrain.compat.patches.installed_version", lambda library: "99.0" if library == "vllm" else None
    )
    (message,) = changed_versions()
    assert message.startswith("vllm is 99.0 now; read these patches again")
    assert "posttrain.compat.vllm.repack_experts_on_reload" in message


def test_the_page_in_the_docs_is_the_one_of_the_code():
    assert (ROOT / "docs" / "compat.md").read_text() == page(), "run: python -m posttrain.compat > docs/compat.md"


@pytest.mark.slow  # a fresh process: others have imported the libraries here
def test_importing_the_records_imports_no_library():
    libraries = sorted({item.library for item in PATCHES.values()})
    program = f"import sys, posttrain.compat; print(sorted(set({libraries}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ------------------------------------------------------------------ no private part of upstream outside of compat

OWN_ATTRIBUTES = {"_exit", "_base_executable"}  # of the standard library


def private_accesses(source: str, ours: set[str]) -> Iterator[str]:
    """Private names that a source reads from something that is not its own: `x._name`, or from `a._b import c`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            dotted = [part for alias in node.names for part in f"{node.module}.{alias.name}".split(".")]
            if not (node.module or "").startswith("posttrain"):
                yield from (part for part in dotted if part.startswith("_") and not part.startswith("__"))
            continue
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else ""
        if name == "__class__" or (name.startswith("_") and not name.startswith("__") and name not in ours):
            yield name


def own_names(source: str) -> set[str]:
    """Private names that a source defines: functions, classes, attributes of self and slots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            names.add(node.attr)
    return names


def test_private_parts_of_upstream_are_used_in_compat_only():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    found = {
        f"{name}: {access}"
        for name, source in sources.items()
        if not name.startswith("compat/")
        for access in private_accesses(source, own_names(source) | OWN_ATTRIBUTES)
    }
    assert found == set(), "move each into a function of posttrain/compat with a Patch record"


@pytest.mark.parametrize(
    "source",
    [
        "def f(llm):\n    return llm._tasks",
        "from ray._private import ray_constants",
        "from deepspeed.utils.groups import _get_group",
        "def f(layer):\n    layer.__class__ = Ours",
        "def f(x):\n    return hasattr(x, '_mapping')",
    ],
)
def test_a_private_access_is_found(source):
    assert len(list(private_accesses(source, set()))) == 1


# ------------------------------------------------------------------ vLLM as it is


@pytest.mark.slow
def test_vllm_still_refuses_to_register_a_backend_twice():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from posttrain.compat.vllm import register_weight_backend

    class Backend:
        pass

    for _ in range(2):
        register_weight_backend("compat-test", Backend)
    with pytest.raises(ValueError, match="already registered"):
        WeightTransferEngineFactory.register_engine("compat-test", Backend)  # type: ignore[arg-type]


@pytest.mark.slow
def test_vllm_still_spawns_its_engine_core_on_cpus(policy, monkeypatch):
    import multiprocessing
    import signal

    import vllm.v1.engine.async_llm  # noqa: F401  (what the core shall not import again)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine import utils as engine_utils

    from posttrain.actors.parent import die_with_parent
    from posttrain.compat.vllm import forked_core

    utils: Any = engine_utils

    def begin(sender):
        sender.send([os.getpid(), "vllm.v1.engine.async_llm" in sys.modules])
        signal.pause()

    # vLLM overwrites these variables. Set here, they are as before after the test.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("NUMEXPR_MAX_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    AsyncEngineArgs(model=str(policy), dtype="float32").create_engine_config()
    assert utils.get_mp_context().get_start_method() == "spawn"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with forked_core(die_with_parent):
        core = utils.get_mp_context().Process(target=begin, args=(sender,))
        core.start()
    try:
        assert utils.get_mp_context().get_start_method() == "spawn"
        assert receiver.recv() == [core.pid, True]
        # Its name in a list of processes is set through Ray; tests/test_rl.py strikes an engine's core by it.
    finally:
        core.kill()
        core.join()


@pytest.mark.slow
def test_vllm_still_sleeps_when_it_pauses():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "asyncio.sleep(" in inspect.getsource(AsyncLLM.pause_generation)


@pytest.mark.slow
def test_vllm_still_keeps_prefixes_while_a_block_is_used():
    from vllm.v1.core.block_pool import BlockPool

    from posttrain.compat.vllm import forget_prefixes

    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=16)
    pool.get_new_blocks(1)
    assert not pool.reset_prefix_cache()
    cached = pool.get_new_blocks(1)[0]
    pool.cached_block_hash_to_block.insert(b"prefix", cached)  # type: ignore[arg-type]
    forget_prefixes(pool)
    assert pool.cached_block_hash_to_block.get_one_block(b"prefix") is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_vllm_still_sends_no_tiles_of_a_picture_in_the_prefix_cache(monkeypatch):
    """A request that is computed again needs them."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
    from vllm.multimodal.utils import strip_covered_mm_data
    from vllm.v1.core.sched import output

    from posttrain.compat.vllm_images import keep_tiles

    tiles = MultiModalKwargsItem()
    features = [MultiModalFeatureSpec(tiles, "image", "key", PlaceholderRange(offset=5, length=12))]
    assert strip_covered_mm_data(features, 32)[0].data is None
    assert "strip_covered_mm_data(" in inspect.getsource(output.NewRequestData.from_request)
    monkeypatch.setattr(output, "strip_covered_mm_data", strip_covered_mm_data)
    keep_tiles()
    assert output.strip_covered_mm_data(features, 32)[0].data is tiles  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_priority_overtakes_only_where_the_queue_is_changed():
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
    from vllm.v1.request import Request

    from posttrain.compat.vllm import serve_by

    policy = SchedulingPolicy.FCFS
    queues = {name: create_request_queue(policy) for name in ("waiting", "kv_holding_waiting")}
    scheduler = SimpleNamespace(policy=policy, **queues)
    for name, priority in (("late", 1), ("urgent", 0)):
        request = Request(name, [1], SamplingParams(max_tokens=1), None, priority=priority, arrival_time=0.0)
        scheduler.waiting.add_request(request)
    assert scheduler.waiting.peek_request().request_id == "late"
    serve_by(scheduler, SchedulingPolicy.PRIORITY)
    assert scheduler.waiting.peek_request().request_id == "urgent"


# ------------------------------------------------------------------ DeepSpeed and Accelerate as they are

ENGINES = """
import json, os, sys
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
import deepspeed, torch
import torch.distributed as dist
from posttrain.compat import deepspeed as compat

found = {"compiles": bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])}
compat.skip_shared_memory_all_reduce()
found["compiles_with_patch"] = bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def build(zero, bf16):
    optimizer = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "bf16": {"enabled": bf16},
              "zero_optimization": {"stage": zero}, "gradient_clipping": 0.0}
    return deepspeed.initialize(model=torch.nn.Linear(4, 1, bias=False), config=config)[0]

def steps(engine):
    return [int(values["step"]) for values in engine.optimizer.optimizer.state.values()]

def decay(engine):
    return float((engine.optimizer.fp32_groups[0][0] - engine.module.weight.float()).abs().max())

def is_muon_compiled():
    from deepspeed.runtime.zero.muon import original_muon

    return hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")

found["checks"] = build(1, False).optimizer.check_grad_overflow
found["muon_is_compiled"] = "deepspeed.runtime.zero.muon.original_muon" in sys.modules and is_muon_compiled()
for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
    del sys.modules[name]
compat.import_muon_uncompiled()
found["muon_is_compiled_with_patch"] = is_muon_compiled()
engine = build(0, True)
found["steps"], found["decay"] = steps(engine), decay(engine)
compat.forget_trial_step(engine)
found["steps_with_patch"], found["decay_with_patch"] = steps(engine), decay(engine)
print(json.dumps(found))
os._exit(0)
"""


def run_program(program: str, **environment: str) -> dict[str, Any]:
    """What a program prints as its last line, as JSON."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                            env={**os.environ, **environment})  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    return run_program(ENGINES)


@pytest.mark.slow
def test_deepspeed_still_compiles_an_all_reduce(engines):
    assert engines["compiles"]
    assert not engines["compiles_with_patch"]


@pytest.mark.slow
def test_deepspeed_still_compiles_muon_to_ask_for_it(engines):
    assert engines["muon_is_compiled"]
    assert not engines["muon_is_compiled_with_patch"]


@pytest.mark.slow
def test_deepspeed_still_takes_a_trial_step(engines):
    assert engines["steps"] == [1]
    assert engines["decay"] > 0
    assert engines["steps_with_patch"] == []
    assert engines["decay_with_patch"] == 0


@pytest.mark.slow
def test_zero_still_applies_infinite_gradients(engines):
    assert engines["checks"] is False


ACCELERATE = """
import json, os
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from posttrain.compat.deepspeed import skip_shared_memory_all_reduce

skip_shared_memory_all_reduce()  # else it is compiled, which takes half a minute
found = {}
for name in ("as_it_is", "turned_off"):
    if name == "turned_off":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    found[name] = str(Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=1)).distributed_type)
    AcceleratorState._reset_state(reset_partial_state=True)
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_accelerate_still_turns_deepspeed_off_by_a_variable():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = run_program(ACCELERATE, **ranks, DS_ACCELERATOR="cpu")
    assert "DEEPSPEED" in found["as_it_is"]
    assert "DEEPSPEED" not in found["turned_off"]


# ------------------------------------------------------------------ transformers, torch and Ray as they are


def test_transformers_still_gives_llama4_a_prefix_that_it_does_not_have():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from posttrain.compat.transformers import name_base_model

    config = Llama4TextConfig(hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=32,
                              num_local_experts=2)  # fmt: skip
    model = Llama4ForCausalLM(config)
    assert not hasattr(model, model.base_model_prefix)
    assert model.base_model is model
    name_base_model(model)
    assert model.base_model is model.model


TORCHVISION = """
import json, sys
error = ""
try:
    import torchvision
except RuntimeError as caught:
    error = str(caught)
print(json.dumps({"error": error, "operators": sys.modules["torchvision.extension"]._has_ops()}))
"""
TORCHVISION_LOADED = """
import json, torch, torchvision
from torchvision.transforms.v2 import functional
print(json.dumps({"size": list(functional.resize(torch.zeros(1, 3, 61, 43, dtype=torch.uint8), [56, 56]).shape)}))
"""


@pytest.mark.slow
def test_torchvision_still_needs_two_operators_on_a_cpu(tmp_path):
    """An environment that sees the packages of this one, first without the hook, then with it."""
    from posttrain.compat.patches import installed_version
    from posttrain.compat.torchvision import write_hook

    if installed_version("torchvision") is None:
        pytest.skip("torchvision is not installed")

    venv.create(tmp_path, with_pip=False, symlinks=True)
    site_packages = next((tmp_path / "lib").glob("python*/site-packages"))
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "heavy.pth").write_text("\n".join(folders) + "\n")

    def run(program: str) -> dict[str, Any]:
        command = [tmp_path / "bin" / "python", "-c", program]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    bare = run(TORCHVISION)
    if bare["operators"]:
        pytest.skip("this torchvision was built for this torch")
    assert bare["error"] == "operator torchvision::nms does not exist"
    write_hook(site_packages)
    assert run(TORCHVISION_LOADED)["size"] == [1, 3, 56, 56]


def schedule(num_groups: int) -> Any:
    import torch

    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(num_groups)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_torch_still_ties_a_schedule_to_its_parameter_groups():
    from posttrain.compat.torch import advance_schedule

    one, two = schedule(1), schedule(2)
    for _ in range(3):
        one.optimizer.step()
        one.step()
    advance_schedule(two, 3)
    assert two.get_last_lr() == one.get_last_lr() * 2
    assert [group["lr"] for group in two.optimizer.param_groups] == [0.25, 0.25]
    restored = schedule(2)
    try:
        restored.load_state_dict(one.state_dict())
        restored.optimizer.step()
        restored.step()
        right = restored.get_last_lr() == [0.2, 0.2]
    except (ValueError, IndexError, RuntimeError):
        right = False
    assert not right, "a schedule of one group continues with two now: use its own state"


RAY = """
import json, os
import ray
from ray._private import ray_constants
from posttrain.compat.ray import loopback_environment, reread_environment

found = [ray_constants.ENABLE_RAY_CLUSTER]
os.environ |= loopback_environment()
found.append(ray_constants.ENABLE_RAY_CLUSTER)
reread_environment()
found.append(ray_constants.ENABLE_RAY_CLUSTER)
print(json.dumps({"cluster": found}))
"""


@pytest.mark.slow
def test_a_local_ray_has_no_server_without_work(ray_session):
    import psutil

    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert any("gcs_server" in command for command in commands)
    servers = ("autoscaler/_private/monitor.py", "_private/log_monitor.py", "dashboard/dashboard", "dashboard/agent")
    assert [command for command in commands if any(server in command for server in servers)] == []
    agents = [command for command in commands if "compat/ray_agent.py" in command and "/raylet/raylet " not in command]
    assert len(agents) == 1


@pytest.mark.slow
def test_ray_still_keeps_the_environment_of_its_import():
    at_import, after_a_change, reread = run_program(RAY, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1")["cluster"]
    assert at_import
    assert after_a_change, "Ray reads the variable when it is used now: remove this part of reread_environment"
    assert not reread


@pytest.mark.slow
def test_ray_tells_what_each_node_has_free(ray_session):
    [node] = ray.nodes()
    assert free_resources()[node["NodeID"]]["CPU"] <= node["Resources"]["CPU"]
