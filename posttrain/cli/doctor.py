"""`posttrain doctor`: what works on this machine, what does not, and how to fix it, one line for each.

The versions of packages and the sizes of the machine are only read. torch, vLLM, DeepSpeed, Ray and the sandbox are
really run, two at a time. Each runs in a process of its own with a deadline, and all its child processes are killed at
the end of its check. A check that fails is tried once more, to tell a passing fault from a lasting one. Nothing is
downloaded, and nothing is written outside of temporary folders. The exit code is 0 if everything needed works, else 2.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from posttrain.actors.processes import kill_marked
from posttrain.cli.doctor_checks import (
    ADD_IMAGES,
    IMAGE_AND_SOUND,
    Check,
    installed,
    machine_checks,
    package_checks,
    patch_checks,
    python_check,
)
from posttrain.errors import EXIT_OK, EXIT_USER

MAX_MESSAGE = 300
MARK = "POSTTRAIN_DOCTOR_PROBE"
UNINSTALL = f"pip uninstall -y {' '.join(IMAGE_AND_SOUND)}"
MEND_TORCHVISION = "python -m posttrain.compat torchvision"
# (pattern of an error message, remedy), the most specific first. {0} in a remedy is the pattern's first group.
REMEDIES = (
    (r"torchvision::nms", f"torchvision was built for another torch: {MEND_TORCHVISION}"),
    (r"torchaudio|torchcodec|libcudart", f"built for another torch, and text needs none: {UNINSTALL}"),
    (r"InvalidCxxCompiler|No working C\+\+ compiler|CppCompileError", "install a C++ compiler: apt-get install g++"),
    (
        r"Error building extension|fatal error: Python\.h",
        "install a compiler and headers: apt-get install g++ python3-dev",
    ),
    (r"No module named '([\w.]+)'", "install what is missing: make install (module {0})"),
    (r"No space left on device", "free some disk, and look at /dev/shm: docker run --shm-size=8g"),
    (r"MemoryError|Cannot allocate memory|out of memory", "free some memory, or use a machine with more"),
    (
        r"Connection (refused|reset)|[Cc]onnect timeout|connectFullMesh failed|No route to host",
        "allow connections to localhost, then try again",
    ),
    (r"There is no sandbox|SandboxError", "allow user namespaces, or install bubblewrap: apt-get install bubblewrap"),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A program of doctor_probes, which tries one thing.

    mend: the remedy if no pattern in REMEDIES matches its output.
    """

    name: str
    title: str
    enables: str
    deadline_s: float
    mend: str
    needed: bool = True


PROBES = (
    Probe("torch", "accelerators", "every stage", 120, "reinstall torch: make install"),
    Probe("vllm", "vLLM samples", "filter, rl, eval: every sampled token", 300, "reinstall vLLM: make install"),
    Probe("imports", "vLLM and Llama 4 import", "every stage", 120, UNINSTALL),
    Probe("images", "an image is read", "models with images", 120, ADD_IMAGES, needed=False),
    Probe("deepspeed", "DeepSpeed trains", "base, sft, rl, dpo", 180, "reinstall DeepSpeed: make install"),
    Probe("ray", "Ray starts", "every pipeline and stage", 120, "stop a stale one: ray stop; unset RAY_ADDRESS"),
    Probe("sandbox", "sandbox", "rewards that run model-written code", 60, "apt-get install bubblewrap", needed=False),
)


@dataclass(frozen=True, slots=True)
class ProbeEnd:
    """How a probe ended.

    found: the JSON that it printed, None if it failed. output: all its output. wall_s: seconds.
    """

    found: Mapping[str, object] | None
    output: str
    timed_out: bool
    wall_s: float


def run_probe(name: str, deadline_s: float, command: Sequence[str] | None = None) -> ProbeEnd:
    """Run a probe to its end or its deadline (in seconds), and kill all processes that it started.

    command: runs instead of the probe's own command, for tests.
    """
    started = time.monotonic()
    mark = uuid.uuid4().hex
    command = command or [sys.executable, "-P", "-m", "posttrain.cli.doctor_probes", name]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(mark), start_new_session=True
        )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_all(process, mark)
        log.seek(0)
        output = log.read()
    found = _last_json(output) if code == 0 else None
    return ProbeEnd(found, output, code is None, time.monotonic() - started)


def _environment(mark: str) -> dict[str, str]:
    environment = {
        **os.environ,
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",  # one token is not worth compiling for
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    for name in ("RAY_ADDRESS", "ACCELERATE_USE_CPU", "VLLM_CPU_KVCACHE_SPACE", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def _kill_all(process: "subprocess.Popen[Any]", mark: str) -> None:
    """Kill the probe and all processes that it started.

    These are the processes of its session, and every process that has `mark` in its environment.
    """
    import psutil

    psutil.wait_procs(kill_marked(MARK, mark, session=process.pid), timeout=5)
    process.wait()


def _last_json(output: str) -> Mapping[str, object] | None:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


def judge(probe: Probe, end: ProbeEnd) -> Check:
    """The line of the doctor for a probe that has ended, with the remedy that fits its message."""
    if end.found is not None:
        return Check("works", probe.title, "ok", str(end.found["found"]), wall_s=end.wall_s)
    lines = [line.strip() for line in end.output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused)\b.*", line)]
    message = (errors or lines or ["ended without a message"])[-1]
    if end.timed_out:
        message = f"not done after {probe.deadline_s:.0f} s; its last line: {message}"
    mend = remedy(end.output, probe.mend)
    mend += f"  (for its whole output: {sys.executable} -m posttrain.cli.doctor_probes {probe.name})"
    status = "fail" if probe.needed else "warn"
    found = message if len(message) < MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
    return Check("works", probe.title, status, found, "", probe.enables, mend, end.wall_s)


def try_probe(probe: Probe, command: Sequence[str] | None = None) -> tuple[ProbeEnd, Check]:
    """Run a probe, and a second time if it fails. Returns the end of the last run, and its check.

    A probe that works the second time is ok, and its check also shows the first failure. A probe that reached its
    deadline is not run again. command: as for `run_probe`.
    """
    end = run_probe(probe.name, probe.deadline_s, command)
    check = judge(probe, end)
    if end.found is not None or end.timed_out:
        return end, check
    again = run_probe(probe.name, probe.deadline_s, command)
    if again.found is None:
        return again, judge(probe, again)
    works = judge(probe, again)
    return again, replace(works, found=f"{works.found}; at a second try, after: {check.found}")


def remedy(output: str, otherwise: str) -> str:
    """The remedy for an error message, on one line; `otherwise` if no pattern in REMEDIES matches."""
    for pattern, mend in REMEDIES:
        match = re.search(pattern, output)
        if match:
            return mend.format(*match.groups())
    return otherwise


def judge_torch(check: Check, end: ProbeEnd, has_gpu: bool) -> Check:
    """The check of torch, turned into a warning if its build does not fit the machine.

    A machine with a GPU needs a CUDA build, any other a CPU build.
    """
    if end.found is None or bool(end.found["cuda"]) == has_gpu:
        return check
    if has_gpu:
        mend = "let pip find a CUDA build (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL), remove .venv, make install EXTRA=gpu"
        return Check("works", check.name, "warn", "there is a GPU, but this torch is a CPU build", "", "", mend)
    found = "this torch is a CUDA build, and no GPU is visible"
    mend = (
        "let pip find a +cpu build (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), remove .venv, make install; or attach a GPU"
    )
    return Check("works", check.name, "warn", found, "", "", mend)


def try_everything(has_gpu: bool, done: Callable[[str], None]) -> list[Check]:
    """Run the probes, two at a time, and return their checks in order.

    done: called with the title of each ended one.
    """
    needs_one_of = {"imports": IMAGE_AND_SOUND, "images": ("torchvision",)}
    missing = {name for name, packages in needs_one_of.items() if not any(map(installed, packages))}
    wanted = [probe for probe in PROBES if probe.name not in missing]

    def one(probe: Probe) -> Check:
        end, check = try_probe(probe)
        done(probe.title)
        return judge_torch(check, end, has_gpu) if probe.name == "torch" else check

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(one, wanted))


def collect(done: Callable[[str], None] = lambda title: None) -> list[Check]:
    """All checks: of the packages, of the machine, and of what works."""
    machine, has_gpu = machine_checks()
    return [python_check(), *package_checks(), *patch_checks(), *machine, *try_everything(has_gpu, done)]


def run_doctor(as_json: bool = False) -> int:
    """Check the machine and print a table (or JSON). Returns the exit code: 0 if everything needed works, else 2."""
    from rich.console import Console

    progress = Console(stderr=True)
    with progress.status("trying torch, vLLM, DeepSpeed, Ray, sandbox (half a minute)") as status:
        checks = collect(lambda title: status.update(f"tried {title}; other checks are running"))
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print_table(checks)
    return EXIT_USER if failed else EXIT_OK


def _print_table(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}
    for group in dict.fromkeys(check.group for check in checks):
        table = Table(title=group, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("", "check", "found", "tested with or wanted", "needed for"):
            table.add_column(column, overflow="fold")
        for check in checks:
            if check.group == group:
                colour = colours[check.status]
                cells = [check.name, check.found, check.expected, check.enables]
                table.add_row(f"[{colour}]{check.status}[/]", *map(escape, cells))
        console.print(table)
        console.print()
    to_mend = [check for check in checks if check.status in ("fail", "warn") and check.mend]
    for check in to_mend:
        console.print(f"[{colours[check.status]}]{check.status}[/] {escape(check.name)}: {escape(check.mend)}")
    num_failed = sum(check.status == "fail" for check in checks)
    console.print(f"{num_failed} needed checks failed" if num_failed else "everything that is needed works")
