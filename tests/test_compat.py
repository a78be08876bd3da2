"""Patches of upstream libraries: each has a true record, and upstream still has the fault or the gap it is for.

A test named `test_LIBRARY_still_...` runs the library without our patch. When it fails after an upgrade, upstream has
been mended: delete the patch together with the test.
"""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.compat import PATCHES, changed_versions
from posttrain.compat.__main__ import page

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
    assert message.startswith("vllm is 99.0 now; look at these patches again")
    assert "posttrain.compat.vllm.repack_experts_on_reload" in message


def test_the_page_in_the_docs_is_the_one_of_the_code():
    assert (ROOT / "docs" / "compat.md").read_text() == page(), "run: python -m posttrain.compat > docs/compat.md"


def test_importing_the_records_imports_no_library():
    libraries = sorted({item.library for item in PATCHES.values()})
    program = f"import sys, posttrain.compat; print(sorted(set({libraries}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ------------------------------------------------------------------ no private part of upstream outside of compat

NOT_YET = ("model/", "parallel/", "pipeline/ray_session.py", "train/", "cli/doctor_probes.py")
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
        if not name.startswith(("compat/", *NOT_YET))
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
