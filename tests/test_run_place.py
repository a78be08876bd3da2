"""A run directory that cannot be used is refused with exit code 2, before anything starts, also by a dry run."""

import json
import os
from pathlib import Path

import pytest
import yaml

from posttrain.cli.main import main


@pytest.fixture
def project(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the config of an SFT stage, and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(4)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": {"path": str(policy)}, "data": {"path": "data/rows.jsonl"}, "max_length": 256}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def refusal(place: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which every command refuses this run directory; nothing is written."""
    before = sorted(Path().rglob("*"))
    messages = []
    for command in (["validate"], ["sft", "--dry-run"], ["sft"]):
        assert main([*command, "sft.yaml", "--run-dir", place]) == 2, command
        messages.append(capsys.readouterr().err.strip())
    assert len(set(messages)) == 1
    assert sorted(Path().rglob("*")) == before
    return messages[0]


def test_a_file_and_a_place_inside_a_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sft.yaml: is a file; the run directory must be a folder or not exist yet" in refusal("sft.yaml", capsys)
    assert f"{project / 'sft.yaml'} is a file; choose another --run-dir" in refusal("sft.yaml/run/a", capsys)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="has no /proc")
def test_a_place_that_cannot_be_written_to(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc/x/y: nothing can be written there" in refusal("/proc/x/y", capsys)
    if os.getuid():  # root may write anywhere
        (project / "mine").mkdir(mode=0o500)
        assert "mine/run: nothing can be written there (Permission denied)" in refusal("mine/run", capsys)


def test_the_folders_of_data_and_models(project: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data: holds data/rows.jsonl, which data.path reads" in refusal("data", capsys)
    assert f"is or lies in {policy}, which model.path reads" in refusal(str(policy), capsys)
    assert f"is or lies in {policy}, which model.path reads" in refusal(str(policy / "run"), capsys)


def test_what_another_run_holds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = project / "runs" / "other"
    (run / "rl").mkdir(parents=True)
    (run / "pipeline.yaml").write_text("name: rl\n")
    (run / "rl" / "DONE").write_text("{}")
    assert "holds a run of pipeline 'rl', not of 'sft'; choose another --run-dir" in refusal("runs/other", capsys)
    assert f"is the folder of a stage, of the run in {run}" in refusal("runs/other/rl", capsys)
    (project / "mixed" / "sft").mkdir(parents=True)
    (project / "mixed" / "sft" / "notes.txt").write_text("mine")
    assert "sft: holds files that no stage made" in refusal("mixed", capsys)


def test_a_folder_that_holds_other_things_may_hold_a_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "new").mkdir()
    (project / "new" / "notes.txt").write_text("mine")
    for place in ("new", "new/deeper/run", "runs/sft"):
        assert main(["sft", "--dry-run", "sft.yaml", "--run-dir", place]) == 0, capsys.readouterr().err
    assert not (project / "runs").exists()
