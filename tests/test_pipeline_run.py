"""The pipeline on a real Ray with small real stages: which stages run, and what is left after a failure or a kill."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pipeline_kinds import said_on

from posttrain.files import read_jsonl
from posttrain.pipeline.watchdog import VARIABLE, session_processes

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parent


def stage(name: str, **config: Any) -> dict[str, Any]:
    return {"name": name, "kind": "count", "config": config}


class Project:
    """A user's folder with a pipeline in it, and the command that runs there."""

    def __init__(self, folder: Path, source: Path):
        self.folder = folder
        self.source = source
        self.run_dir = folder / "runs" / "p"

    def write(self, *stages: dict[str, Any], **more: Any) -> None:
        (self.folder / "p.yaml").write_text(yaml.safe_dump({"name": "p", "stages": list(stages), **more}))

    def start(self, *arguments: str, terminal: int | None = None) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.source), str(TESTS)])
        environment = {**os.environ, "PYTHONPATH": path, "POSTTRAIN_TEST_EVAL": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        environment.pop(VARIABLE, None)  # of a session that this process may have: its mark is not the driver's
        return subprocess.Popen(
            [sys.executable, str(TESTS / "pipeline_kinds.py"), *arguments],
            cwd=self.folder,
            env=environment,
            stdin=terminal if terminal is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal if terminal is not None else subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def answer(self, answer: str, *arguments: str) -> tuple[int, str, str]:
        """Run on a terminal where a user types `answer`; returns the exit code, the output, and what was asked."""
        master, terminal = os.openpty()
        os.write(master, f"{answer}\n".encode())
        process = self.start(*arguments, terminal=terminal)
        os.close(terminal)
        out, _ = process.communicate(timeout=180)
        return process.returncode, out, said_on(master)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*(arguments or ("run", "p.yaml")))
        out, error = process.communicate(timeout=180)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def events(self, name: str = "", stage: str = "") -> list[dict[str, Any]]:
        found = list(read_jsonl(self.run_dir / "events.jsonl"))
        return [e for e in found if name in ("", e["event"]) and stage in ("", e["stage"])]

    def wait_for(self, event: str, stage: str, process: subprocess.Popen[str], times: int = 1) -> None:
        for _ in range(1200):
            if len(self.events(event, stage)) >= times:
                return
            if process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no event {event} of {stage}: {process.communicate()[1]}")

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    def statuses(self) -> dict[str, str]:
        return {record["name"]: record["status"] for record in self.summary()["stages"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package: an edit of the checkout while the tests run would make every stage's hash another one."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("posttrain", "pipelines", "configs", "rewards"):
        shutil.copytree(TESTS.parent / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def project(tmp_path: Path, source: Path) -> Project:
    return Project(tmp_path, source)


def session_of(driver: int) -> str:
    """The mark of the session that a driver has started, read from one of its children."""
    for child in psutil.Process(driver).children(recursive=True):
        try:
            mark = child.environ().get(VARIABLE)
        except psutil.Error:
            continue
        if mark:
            return mark
    raise AssertionError("the driver has no marked child")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def gone(session: str, pids: list[int], seconds: float) -> bool:
    """Whether all processes of a session, and these, end within so many seconds."""

    def ended() -> bool:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        return not session_processes(session) and not alive

    return wait_until(ended, seconds)


def test_run_skip_change_and_evaluate(project: Project):
    """One run from nothing; the same again; then with one stage changed."""
    long = {"step_s": 0.2, "steps": 10}
    score = {"config": {"model": {"path": "x"}, "weight": 1}, "stages": ["a", "c"]}
    stages = [
        stage("a", add=1),
        stage("b", source="${a.count}", **long),
        stage("c", source="${a.count}", add=2, **long),
    ]
    project.write(*stages, evaluate=score)
    first = project.run()
    assert first.returncode == 0, first.stderr
    summary = project.summary()
    assert summary["status"] == "done"
    assert [record["name"] for record in summary["stages"]] == ["a", "b", "c"]
    assert project.statuses() == {"a": "done", "b": "done", "c": "done"}
    assert summary["eval"] == {"a": {"all": {"n": 1, "greedy": 1}}, "c": {"all": {"n": 1, "greedy": 3}}}
    assert summary["peak_rss_gib"] > 0.05
    assert {"python", "posttrain", "ray", "torch"} <= set(summary["versions"])
    assert first.stdout.strip().splitlines()[-1].endswith("report.html")
    done = json.loads((project.run_dir / "c" / "DONE").read_text())
    assert done["outputs"]["count"] == "c/count.txt"
    assert done["input_hash"] == summary["stages"][2]["input_hash"]
    assert yaml.safe_load((project.run_dir / "c" / "config.yaml").read_text())["source"] == str(
        project.run_dir / "a" / "count.txt"
    )
    assert "step_s: 0.2" in (project.run_dir / "pipeline.yaml").read_text()
    log = (project.run_dir / "a" / "log.txt").read_text()
    assert "counting in process" in log
    assert "written to the descriptor itself" in log
    assert "counting in process" not in first.stdout + first.stderr
    # b and c need one CPU each and only a: they ran side by side.
    span = {name: (project.events("begins", name)[0]["t"], project.events("stage_done", name)[0]["t"]) for name in "bc"}
    assert max(start for start, _ in span.values()) < min(end for _, end in span.values())

    second = project.run()
    assert second.returncode == 0, second.stderr
    assert project.statuses() == {"a": "skipped", "b": "skipped", "c": "skipped"}
    assert second.stdout.count("skipped: config, inputs and code are as before") == 5
    assert project.summary()["eval"] == summary["eval"]
    assert project.summary()["peak_rss_gib"] >= summary["peak_rss_gib"]

    refused = project.run("run", "p.yaml", "c.add=5")
    assert refused.returncode == 2
    assert "c, a finished result: add: 2 → 5\n  c.eval, a finished result: stage c runs anew" in refused.stderr
    planned = project.run("run", "p.yaml", "c.add=5", "--dry-run").stdout
    assert "c (count)  [run anew because add: 2 → 5]\n  replaces  a finished result in " in planned
    assert (project.run_dir / "c" / "DONE").exists()

    code, out, asked = project.answer("y", "run", "p.yaml", "c.add=5", "b.steps=12")
    assert code == 0, out + asked
    assert "c, a finished result: add: 2 → 5" in asked
    assert project.statuses() == {"a": "skipped", "b": "done", "c": "done"}
    assert project.summary()["eval"]["c"]["all"]["greedy"] == 6
    assert len(project.events("begins", "c")) == 1, "events of the earlier run of c are gone with its folder"
    assert [event["step"] for event in project.events("begins", "b")] == [0, 10], "b went on from its last checkpoint"
    assert "c  its earlier result is kept until the new one is complete: " in out
    assert "c  its new result is complete; the earlier one is deleted: " in out
    assert not (project.run_dir / ".replaced").exists()

    other = project.run("run", "p.yaml", "name=q", "--run-dir", "runs/p")
    assert other.returncode == 2
    assert "holds a run of pipeline 'p'" in other.stderr
    assert "not of 'q'" in other.stderr


def test_a_failed_stage_leaves_the_rest_and_is_continued(project: Project):
    """The stage's process is killed; then it raises; then its trouble is over."""
    trouble = {"trouble_unless": "mended", "steps": 3}
    project.write(
        stage("a"), stage("b", source="${a.count}", trouble="kill", **trouble), stage("c", source="${b.count}")
    )
    killed = project.run()
    assert killed.returncode == 3
    assert "stage b failed: its process ended without an answer" in killed.stderr
    assert "To continue: posttrain run p.yaml" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert project.statuses() == {"a": "done", "b": "failed"}
    assert project.summary()["status"] == "failed"
    assert not (project.run_dir / "b" / "DONE").exists()
    assert (project.run_dir / "report.html").exists()

    raised = project.run("run", "p.yaml", "b.trouble=error", "--overwrite")
    assert raised.returncode == 3
    (earlier,) = (project.run_dir / ".replaced" / "b").iterdir()
    assert f"The earlier result of b is in {earlier}" in raised.stderr
    assert "stage b failed: ValueError: the experts disagree\n" in raised.stderr
    assert "a second line" not in raised.stderr
    log = (project.run_dir / "b" / "log.txt").read_text()
    assert "Traceback" in log
    assert "a second line" in log
    assert project.statuses() == {"a": "skipped", "b": "failed"}

    (project.folder / "mended").touch()
    mended = project.run("run", "p.yaml", "b.trouble=error")
    assert mended.returncode == 0, mended.stderr
    assert project.statuses() == {"a": "skipped", "b": "done", "c": "done"}
    assert [event["step"] for event in project.events("begins", "b")] == [0, 3], "it went on from its checkpoint"
    assert project.events("stage_start", "b")[-1]["resumed"] is True
    assert not earlier.exists(), "a later run made the result that it was kept for"


def test_a_users_mistake_found_by_a_stage_exits_with_2_and_a_missing_output_is_a_failure(project: Project):
    project.write(stage("a", trouble="user"), stage("b", source="${a.count}"))
    done = project.run()
    assert done.returncode == 2
    assert done.stderr.startswith("stage a: rows.jsonl: row 37: no 'messages'\n")
    done = project.run("run", "p.yaml", "a.trouble=nothing", "--overwrite")
    assert done.returncode == 3
    assert "stage a failed: it ended without writing count" in done.stderr
    assert not (project.run_dir / "a" / "DONE").exists()


def test_a_process_without_the_mark_is_found_by_its_log(tmp_path: Path):
    """Ray's agents write their title over their environment."""
    folder = tmp_path / "ray"
    folder.mkdir()
    with (folder / "agent.log").open("w") as log:
        process = subprocess.Popen(["sleep", "60"], env={}, stdout=log)
    try:
        assert process.pid in session_processes("0123", str(folder))
        assert process.pid not in session_processes("0123", str(tmp_path / "other"))
        assert process.pid not in session_processes("0123")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process_and_the_run_can_be_continued(project: Project, number: signal.Signals):
    project.write(stage("a"), stage("b", source="${a.count}", steps=60, step_s=0.2))
    process = project.start("run", "p.yaml")
    project.wait_for("progress", "b", process, times=4)
    session = session_of(process.pid)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) > 5
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C goes to every process of the terminal's group
        time.sleep(0.3)
        os.killpg(process.pid, number)  # and people press it twice
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "To continue: posttrain run p.yaml" in error
    assert "Traceback" not in error
    assert gone(session, children, 5), "something outlived the driver"
    assert project.summary()["status"] == "interrupted"
    assert project.statuses() == {"a": "done", "b": "interrupted"}
    assert not (project.run_dir / "b" / "DONE").exists()
    if number is signal.SIGINT:
        again = project.run("run", "p.yaml")
        assert again.returncode == 0, again.stderr
        assert project.statuses() == {"a": "skipped", "b": "done"}
        assert project.events("begins", "b")[-1]["step"] > 0


def test_nothing_survives_a_killed_driver(project: Project):
    project.write(stage("a"), stage("b", source="${a.count}", steps=600, step_s=0.2))
    process = project.start("run", "p.yaml")
    project.wait_for("progress", "b", process, times=2)
    session = session_of(process.pid)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    folders = {
        match[1]
        for pid in children
        for match in re.finditer(r"(/tmp/ptr-\w+)", " ".join(psutil.Process(pid).cmdline()))
    }
    assert folders
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert gone(session, children, 20), "something outlived the killed driver"
    assert wait_until(lambda: not any(Path(folder).exists() for folder in folders), 10)
    assert project.summary()["status"] == "interrupted"
    assert not (project.run_dir / "b" / "DONE").exists()
    again = project.run("run", "p.yaml", "--dry-run")
    assert re.search(r"b \(count\)  \[continue from step \d+: it was interrupted\]", again.stdout)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of two MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_full_disk_is_one_message_and_the_run_can_be_continued(project: Project, small_disk: Path | None):
    """A real full disk if one can be mounted, and a limit on file size anywhere."""
    project.write(stage("a"), stage("b", source="${a.count}", write_bytes=8 << 20, limit_bytes=4 << 20))
    limited = project.run()
    assert limited.returncode == 3
    assert os.strerror(errno.EFBIG) in limited.stderr
    assert project.statuses() == {"a": "done", "b": "failed"}
    assert not (project.run_dir / "b" / "DONE").exists()
    if small_disk is None:
        return
    project.run_dir = small_disk / "run"
    full = project.run("run", "p.yaml", "b.limit_bytes=null", "--run-dir", str(project.run_dir), "--overwrite")
    assert full.returncode == 3, full.stderr
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert "To continue:" in full.stderr
    assert (project.run_dir / "a" / "DONE").exists()
    assert not (project.run_dir / "b" / "DONE").exists()
    (project.run_dir / "b" / "big").unlink()
    mended = project.run(
        *("run", "p.yaml", "b.limit_bytes=null", "b.write_bytes=65536", "--run-dir", str(project.run_dir)),
        "--overwrite",
    )
    assert mended.returncode == 0, mended.stderr
    assert project.statuses() == {"a": "skipped", "b": "done"}


def test_a_local_ray_is_closed_to_others(project: Project):
    """Every port listens on the loopback interface, and there is no way in without the token."""
    project.write(stage("a", steps=100, step_s=0.2))
    process = project.start("run", "p.yaml")
    try:
        project.wait_for("progress", "a", process)
        children = psutil.Process(process.pid).children(recursive=True)
        ports = [c.laddr for child in children for c in child.net_connections("inet") if c.status == "LISTEN"]
        assert ports
        assert {address.ip.removeprefix("::ffff:") for address in ports} <= {"127.0.0.1", "::1"}
        gcs = next(child for child in children if "gcs_server" in child.name())
        port = next(c.laddr.port for c in gcs.net_connections("inet") if c.status == "LISTEN")
        program = f"from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:{port}')"
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        stranger = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert stranger.returncode != 0
        assert "InvalidAuthToken" in stranger.stderr
    finally:
        process.terminate()
        process.communicate(timeout=60)
