"""Runs that are copied to a URI: what is copied, who may write, and a run that another host continues."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pipeline_kinds import CountConfig
from test_pipeline_run import Project, project, source, stage

from posttrain.cli.main import main
from posttrain.config.environments import EnvironmentFunctionConfig
from posttrain.config.rewards import RewardFunctionConfig
from posttrain.errors import ConfigError, StageError, UserError
from posttrain.files import read_jsonl
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.plugins import plugin_files
from posttrain.pipeline.rundir import RunDir
from posttrain.pipeline.storing import HELD, resume_run, stored
from posttrain.storage.mirror import Succeeded, begin, newest_of, restore, take
from posttrain.storage.store import StorageError, Store

__all__ = ["project", "source"]  # fixtures


def fill(folder: Path, **contents: str) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in contents}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(store: Store, folder: Path) -> dict[str, str]:
    newest = newest_of(store)
    assert newest is not None
    for _ in restore(store, newest[1].files, lambda name: folder / name):
        pass
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


# --- states of a folder ---


def test_a_state_is_brought_back_as_it_was(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    mirror = begin(store, run="r", pipeline="p", token="one")
    mirror.commit(fill(tmp_path / "run", a="first", b="second"))
    mirror.commit(fill(tmp_path / "run", a="changed", c="first"))
    assert contents(store, tmp_path / "back") == {"a": "changed", "c": "first"}
    # The content that no state of the run has any more is deleted.
    assert len(store.names("blobs")) == 2


def test_equal_states_make_no_new_manifest_and_equal_content_is_copied_once(tmp_path: Path):
    store = Store((tmp_path / "store").as_uri())
    mirror = begin(store, run="r", pipeline="p", token="one")
    files = fill(tmp_path / "run", a="same", b="same")
    for _ in range(3):
        mirror.commit(files)
    assert len(store.names("manifests")) == 2
    assert len(store.names("blobs")) == 1


def test_who_was_succeeded_writes_nothing(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    old = begin(store, run="r", pipeline="p", token="one")
    old.commit(fill(tmp_path / "run", a="before"))
    newest = newest_of(store)
    assert newest is not None
    new = take(store, *newest, token="two")
    names = store.names("manifests")
    with pytest.raises(Succeeded, match="since epoch 2"):
        old.commit(fill(tmp_path / "run", a="after the cut"))
    with pytest.raises(Succeeded):  # also when it has nothing new to write
        old.commit(fill(tmp_path / "run", a="before"))
    assert store.names("manifests") == names
    assert contents(store, tmp_path / "back") == {"a": "before"}
    new.commit(fill(tmp_path / "other", a="continued"))
    assert contents(store, tmp_path / "back") == {"a": "continued"}


def test_of_many_that_take_a_run_at_once_one_has_it(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    begin(store, run="r", pipeline="p", token="one")
    newest = newest_of(store)
    assert newest is not None
    won: list[str] = []
    barrier = threading.Barrier(8)

    def attempt(token: str) -> None:
        own = Store(str(tmp_path / "store"))
        barrier.wait()
        try:
            won.append(take(own, *newest, token=token).manifest.token)
        except Succeeded:
            return

    threads = [threading.Thread(target=attempt, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    newest = newest_of(store)
    assert newest is not None
    assert won == [newest[1].token]


def test_old_manifests_go_and_the_newest_stays(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    mirror = begin(store, run="r", pipeline="p", token="one")
    for number in range(60):
        mirror.commit(fill(tmp_path / "run", a=str(number)))
    assert len(store.names("manifests")) <= 22
    assert contents(store, tmp_path / "back") == {"a": "59"}


def test_damaged_content_is_refused(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    begin(store, run="r", pipeline="p", token="one").commit(fill(tmp_path / "run", a="content"))
    blob = tmp_path / "store" / store.names("blobs")[0]
    blob.write_text("c0ntent")
    with pytest.raises(StorageError, match=r"is damaged; it should be a"):
        contents(store, tmp_path / "back")
    assert not (tmp_path / "back" / "a").exists()


# --- run directories ---


def pipeline_of(uri: str, run_dir: Path) -> tuple[Pipeline, RunDir]:
    node = Node("count", "rl", CountConfig(), (), "count", "p.yaml", "")
    place = RunDir(run_dir)
    place.path.mkdir(parents=True, exist_ok=True)
    return Pipeline("p.yaml", "p", 0, False, {"count": node}, uri), place


def names_in(uri: str) -> set[str]:
    newest = newest_of(Store(uri))
    assert newest is not None
    return set(newest[1].files)


def test_what_is_being_written_is_left_out(tmp_path: Path):
    uri = str(tmp_path / "store")
    pipeline, place = pipeline_of(uri, tmp_path / "run")
    files = ("whole/ledger.sqlite", "whole/model.bin", "half/model.bin")
    for name in files:
        write(place.path / "count" / "checkpoints" / f"step_{name}", name)
    for name in ("ledger.sqlite", "ledger.sqlite-wal", ".metrics.jsonl.x-1-0.writing", "metrics.jsonl"):
        write(place.path / "count" / name, name)
    with stored(pipeline, place):
        pass
    assert names_in(uri) == {
        "count/checkpoints/step_whole/ledger.sqlite", "count/checkpoints/step_whole/model.bin", "count/metrics.jsonl",
    }  # fmt: skip
    write(place.path / "count" / "DONE", "{}")
    with stored(pipeline, place):
        pass
    assert "count/ledger.sqlite" in names_in(uri)


def test_the_same_folder_holds_its_run_again_and_another_is_refused(tmp_path: Path):
    uri = str(tmp_path / "store")
    for epoch in (1, 2, 3):
        pipeline, place = pipeline_of(uri, tmp_path / "run")
        with stored(pipeline, place):
            newest = newest_of(Store(uri))
            assert newest is not None
            assert newest[1].epoch == epoch
    other, elsewhere = pipeline_of(uri, tmp_path / "other")
    with pytest.raises(ConfigError, match="holds another run, of pipeline 'p'"), stored(other, elsewhere):
        pass
    brought = resume_run(uri, tmp_path / "brought")
    with pytest.raises(ConfigError, match="the run was continued on"), stored(pipeline, place):
        pass
    again, there = pipeline_of(uri, brought)
    with stored(again, there):
        pass


def overtaken(uri: str, place: RunDir, brought: Path) -> None:
    resume_run(uri, brought)
    write(place.path / "late.txt", "written after another host took the run")


def test_a_host_that_was_succeeded_is_told_and_its_last_state_is_not_written(tmp_path: Path):
    uri = str(tmp_path / "store")
    pipeline, place = pipeline_of(uri, tmp_path / "run")
    with pytest.raises(StageError, match="this host wrote nothing there since"), stored(pipeline, place):
        overtaken(uri, place, tmp_path / "brought")
    assert "late.txt" not in names_in(uri)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    pipeline, place = pipeline_of("/proc/self/storage", tmp_path / "run")  # where not even root may make a folder
    with pytest.raises(UserError, match="storage: got '/proc/self/storage'"), stored(pipeline, place):
        pass


def test_a_folder_that_is_there_and_cannot_be_written_is_refused(tmp_path: Path):
    pipeline, place = pipeline_of("/proc/self", tmp_path / "run")
    message = r"storage: /proc/self: manifests/0+1 cannot be written: .*; give a place that this host reaches and may"
    with pytest.raises(ConfigError, match=message), stored(pipeline, place):
        pass


@pytest.mark.slow  # seconds, until the store gives up
def test_a_store_that_is_not_reached_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:  # nothing listens there
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ALLOW_HTTP"):
            monkeypatch.setenv(name, "true")
        pipeline, place = pipeline_of("s3://bucket/run", tmp_path / "run")
        message = "storage: s3://bucket/run: manifests cannot be listed: .*; give a place that this host reaches"
        with pytest.raises(ConfigError, match=message), stored(pipeline, place):
            pass


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s4://bucket/run", "got 's4://bucket/run'"),
        ("{folder}/file/below", "file"),
        ("{folder}/empty", "no run is stored there"),
    ],
)
def test_a_uri_that_holds_no_run_is_named(uri: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("not a folder")
    place = uri.format(folder=tmp_path)
    assert main(["run", "--resume", place, "--run-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_resume_takes_no_pipeline_and_no_filled_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "quickstart", "--resume", str(tmp_path / "store")]) == 2
    assert "give none" in capsys.readouterr().err
    assert main(["run"]) == 2
    assert "give a pipeline" in capsys.readouterr().err
    pipeline, place = pipeline_of(str(tmp_path / "store"), tmp_path / "run")
    with stored(pipeline, place):
        pass
    assert main(["run", "--resume", str(tmp_path / "store"), "--run-dir", str(place.path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_stored_run_writes_nothing_outside_of_its_folder(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    file = fill(tmp_path / "run", a="text")["a"]
    begin(store, run="r", pipeline="p", token="one").commit({"a": file, "../../escaped": file})
    with pytest.raises(ConfigError, match="outside of the run directory"):
        resume_run(str(tmp_path / "store"), tmp_path / "brought")
    newest = newest_of(store)
    assert newest is not None
    assert newest[1].epoch == 1  # nor was it taken


def test_files_of_plug_ins_are_inputs(tmp_path: Path):
    for name in ("own", "inner", "world"):
        (tmp_path / f"{name}.py").write_text("def f(rollout, row): return 0.0\nasync def e(session, row): return 0.0\n")
    own, inner, world = (tmp_path / f"{name}.py" for name in ("own", "inner", "world"))
    summed = {"rewards": {f"{inner}:f": 1.0, "exact_match": {"weight": 1.0}}}
    for plugin, files in (
        (RewardFunctionConfig(name=f"{own}:f"), [own]),
        (RewardFunctionConfig(name="exact_match"), []),
        (RewardFunctionConfig(name="weighted_sum", args=summed), [inner]),
        (EnvironmentFunctionConfig(name=f"{world}:e"), [world]),
    ):
        assert plugin_files(plugin) == files


def test_a_run_goes_on_in_the_directory_from_which_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = str(tmp_path / "store")
    began, elsewhere = tmp_path / "began", tmp_path / "elsewhere"
    for folder in (began, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(began)
    with stored(*pipeline_of(uri, tmp_path / "run")):
        pass
    began.rename(tmp_path / "gone")
    monkeypatch.chdir(elsewhere)
    resume_run(uri, Path("brought"))
    assert Path.cwd() == began
    assert (elsewhere / "brought" / HELD).exists()


# --- a run that goes on elsewhere ---


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_is_continued_from_its_uri_after_its_host_is_gone(project: Project, tmp_path: Path):
    uri = str(tmp_path / "store")
    data = tmp_path / "inputs" / "rows.jsonl"
    write(data, '{"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}]}\n')
    second = stage("second", source="${first.count}", steps=400, step_s=0.1, data={"path": str(data)})
    project.write(stage("first", add=5), second, storage=uri)
    process = project.start("run", "p.yaml")
    wait_for(lambda: any("second/checkpoints/" in name for name in stored_names(uri)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for path in (project.run_dir, data.parent, project.folder / "p.yaml"):  # the host with its disk is gone
        path.rename(tmp_path / f"lost-{path.name}")
    brought = project.folder / "brought"
    found = project.run("run", "--resume", uri, "--run-dir", str(brought), "second.step_s=0.0")
    assert found.returncode == 0, found.stderr
    assert (brought / "second" / "count.txt").read_text() == "6"
    assert data.exists()
    events = list(read_jsonl(brought / "events.jsonl"))
    assert [event["stage"] for event in events if event["event"] == "stage_skipped"] == ["first"]
    begun = [event["step"] for event in events if event["event"] == "begins" and event["stage"] == "second"]
    assert begun[0] == 0
    assert begun[-1] > 0  # it went on from a checkpoint
    assert {"second/DONE", "second/count.txt", "summary.json", "report.html"} <= stored_names(uri)
    # The old host comes back with its disk: it may not write, and is told who holds the run.
    (tmp_path / f"lost-{project.run_dir.name}").rename(project.run_dir)
    (tmp_path / "lost-p.yaml").rename(project.folder / "p.yaml")
    back = project.run()
    assert back.returncode == 2
    assert "the run was continued on" in back.stderr


@pytest.mark.slow
def test_a_run_whose_place_is_taken_ends_and_can_be_told_apart(project: Project, tmp_path: Path):
    uri = str(tmp_path / "store")
    project.write(stage("first", steps=3000, step_s=0.1), storage=uri)
    process = project.start("run", "p.yaml")
    wait_for(lambda: any("first/checkpoints/" in name for name in stored_names(uri)), process)
    resume_run(uri, tmp_path / "brought")
    _, error = process.communicate(timeout=180)
    assert process.returncode == 3
    assert "this host wrote nothing there since" in error
    assert (project.run_dir / HELD).exists()


def stored_names(uri: str) -> set[str]:
    try:
        newest = newest_of(Store(uri))
    except StorageError:  # a manifest that was deleted between the list and the read
        return set()
    return set(newest[1].files) if newest is not None else set()
