"""Fixtures that several test files share: a tiny Llama 4 with random weights, its tokenizer, and one Ray session."""

import gc
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import process_guard
import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A property test must not fail because the machine is busy, so there is no deadline.
settings.register_profile("posttrain", deadline=None)
settings.load_profile("posttrain")


# The imports of the test files make a million objects that stay. Python's collector would scan them again and again,
# while they are imported and in the tests after that.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions report as leaked what is never collected


# Files whose tests take a minute or more, the longest first. They are started first: a long file that starts last
# leaves the other process idle.
LONG = (
    "test_quickstart.py",
    "test_rl_faults.py",
    "test_rl.py",
    "test_pipeline_run.py",
    "test_expert_parallel.py",
    "test_python.py",
    "test_rl_judge.py",
    "test_sampling.py",
    "test_vision_sft.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", help="JSON file for what tests record with record_property, by test")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with process_guard.guarded(item.keywords):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with process_guard.guarded(item.keywords):
        return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the recorded figures of the tests that passed."""
    path = config.getoption("--figures")
    if not path:
        return
    found = {report.nodeid: dict(report.user_properties) for report in terminalreporter.getreports("passed")
             if report.when == "call" and report.user_properties}  # fmt: skip
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers", "trl")}
    Path(path).write_text(json.dumps({"versions": versions, "figures": found}, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The quick start's tokenizer."""
    from posttrain.base.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder: the quick start's architecture, smaller, with random weights that tell replies apart."""
    import torch

    from posttrain.base.config import ModelSizes
    from posttrain.base.model import build_model
    from posttrain.base.tokenizer import save_tokenizer

    sizes = ModelSizes(hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, expert_ffn=96)
    model = build_model(sizes, tiny_tokenizer, 0.0, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else every token is about as likely as any other
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama 4 with two mixture-of-experts layers, for stages that train."""
    from tiny_policy import save_tiny_policy

    return save_tiny_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 supervised rows of sums."""
    from tiny_policy import write_sums

    return write_sums(tmp_path_factory.mktemp("data") / "sft.jsonl", 48)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray for all tests that need one in this process; it ends, with its children, when the tests do."""
    from posttrain.pipeline.ray_session import ray_session as session

    with session():
        yield


@pytest.fixture(scope="session")
def warm_ranks(ray_session: None) -> Iterator[Any]:
    """Ranks that stay until the tests end."""
    from warm_ranks import WarmRanks

    ranks = WarmRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def ranks(warm_ranks: Any) -> Iterator[Any]:
    """In the tests of a module that asks for this, SFT, RL and DPO train on warm ranks, not on ranks of their own."""
    with warm_ranks.lent():
        yield warm_ranks


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy, so that the checkout gets no build folder."""
    import shutil
    import subprocess
    import sys

    root = Path(__file__).resolve().parent.parent
    copy = tmp_path_factory.mktemp("source")
    for name in ("posttrain", "rewards", "pipelines", "configs"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (root / name).exists():
            shutil.copy(root / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def installed_wheel(built_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `posttrain` executable of a virtual environment that holds the wheel alone.

    The heavy packages are seen through a .pth line that names this environment's site-packages. Lines of .pth files in
    there are not followed, so an editable installation of the checkout stays out of sight. What torchvision needs on a
    CPU is written as `make install` does.
    """
    import subprocess
    import sys
    import sysconfig
    import venv

    from posttrain.compat.torchvision import write_hook

    folder = tmp_path_factory.mktemp("wheel") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(built_wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    (site_packages / "heavy.pth").write_text(sysconfig.get_path("purelib") + "\n")
    write_hook(site_packages)
    return folder / "bin" / "posttrain"
