"""Trackers: what they receive of metrics.jsonl, and that none of them can end or delay a run.

None of the three tracker packages is installed for the tests. So the tests run all of our code, but with trackers that
write to a file, fail or hang in place of these packages.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.trackers import TrackersConfig
from posttrain.context import StageContext
from posttrain.errors import ConfigError
from posttrain.files import keep_lines, read_jsonl
from posttrain.metrics import trackers as module
from posttrain.metrics.trackers import Opener, Tracker, arguments, tracked
from posttrain.pipeline.graph import load_pipeline
from posttrain.pipeline.hashing import input_hash

ALL = {"tensorboard": True, "trackio": {"project": "p"}, "wandb": {"project": "q"}}
MISSING = [name for name in ALL if find_spec(name) is None]


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    folder = tmp_path / "trial" / "rl"
    folder.mkdir(parents=True)
    return StageContext("rl", folder, folder.parent / "events.jsonl")


def to_file(path: Path, fails_at: int | None = None) -> Opener:
    """A tracker that writes JSON lines, and fails at a step."""

    def open_tracker(kwargs: dict[str, Any], first: int) -> Tracker:
        def write(**record: Any) -> None:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")

        def log(step: int, values: Mapping[str, float]) -> None:
            if step == fails_at:
                raise ConnectionError("no route\nto the host")
            write(step=step, **values)

        write(opened=kwargs, first=first)
        return Tracker(log, lambda: write(closed=True))

    return open_tracker


def failures(context: StageContext) -> list[tuple[str, str]]:
    events = read_jsonl(context.events)
    return [(event["tracker"], event["error"]) for event in events if event["event"] == "tracker_failed"]


def test_each_tracker_is_given_the_numbers_of_each_step(context: StageContext, tmp_path: Path):
    config = TrackersConfig.model_validate(ALL)
    openers = {name: to_file(tmp_path / name) for name in ALL}
    context.metrics(0, {"loss": 9.0})  # of an earlier sitting
    with tracked(config, context, openers):
        context.metrics(1, {"loss": 0.5, "reward/math": 1, "note": "text", "none": None})
        context.metrics(2, {"loss": 0.25})
    for name, kwargs in arguments(config, "trial", "rl", folder=context.dir).items():
        assert list(read_jsonl(tmp_path / name)) == [
            {"opened": kwargs, "first": 1},
            {"step": 1, "loss": 0.5, "reward/math": 1},
            {"step": 2, "loss": 0.25},
            {"closed": True},
        ]
    assert failures(context) == []


def test_a_stage_that_goes_on_from_a_checkpoint_tells_only_what_is_new(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "POLL_S", 0.01)
    for step in range(4):
        context.metrics(step, {"loss": 1.0})
    seen = tmp_path / "seen"
    with tracked(TrackersConfig(tensorboard=True), context, {"tensorboard": to_file(seen)}):
        keep_lines(context.dir / "metrics.jsonl", lambda line: line["step"] < 2)
        context.metrics(2, {"loss": 2.0})
        while not seen.exists():
            threading.Event().wait(0.01)
        keep_lines(context.dir / "metrics.jsonl", lambda line: line["step"] < 2)  # again, while it runs
        context.metrics(2, {"loss": 3.0})
        context.metrics(3, {"loss": 4.0})
    lines = [line for line in read_jsonl(seen) if "step" in line]
    assert lines == [{"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 4.0}]


def test_a_tracker_that_fails_is_reported_once_and_off(context: StageContext, tmp_path: Path):
    def refuses(kwargs: dict[str, Any], first: int) -> Tracker:
        raise SystemExit("log in first")

    openers = {
        "trackio": to_file(tmp_path / "bad", fails_at=2),
        "wandb": refuses,
        "tensorboard": to_file(tmp_path / "good"),
    }
    with tracked(TrackersConfig.model_validate(ALL), context, openers):
        for step in range(5):
            context.metrics(step, {"loss": 1.0})
    steps = {name: [line["step"] for line in read_jsonl(tmp_path / name) if "step" in line] for name in ("good", "bad")}
    assert steps == {"good": [0, 1, 2, 3, 4], "bad": [0, 1]}
    assert sorted(failures(context)) == [
        ("trackio", "ConnectionError: no route"),
        ("wandb", "SystemExit: log in first"),
    ]
    assert len(list(read_jsonl(context.dir / "metrics.jsonl"))) == 5


def test_a_tracker_that_hangs_does_not_hold_up_the_stage(context: StageContext, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "END_S", 0.2)
    never = threading.Event()
    with tracked(
        TrackersConfig(tensorboard=True), context, {"tensorboard": lambda kwargs, first: never.wait() and None}
    ):
        context.metrics(0, {"loss": 1.0})
    assert failures(context) == [("tensorboard", "did not finish within 0.2 s")]
    never.set()


def test_nothing_is_started_by_default(context: StageContext):
    before = set(threading.enumerate())
    for config in (None, TrackersConfig()):
        with tracked(config, context, {}):
            context.metrics(0, {"loss": 1.0})
            assert not any(thread.name == "trackers" for thread in set(threading.enumerate()) - before)


@pytest.mark.skipif(not MISSING, reason="all packages of trackers are installed")
def test_a_package_that_went_missing_after_the_check_costs_no_run(context: StageContext):
    with tracked(TrackersConfig.model_validate({name: ALL[name] for name in MISSING}), context):
        context.metrics(0, {"loss": 1.0})
    assert [name for name, _ in failures(context)] == MISSING


STAGE_MODULE = """
from pathlib import Path
from posttrain.config.base import Config
from posttrain.config.trackers import TrackersConfig
from posttrain.pipeline.kinds import StageKind
from posttrain.pipeline.stage_process import StageJob, run_stage

class ToyConfig(Config):
    trackers: TrackersConfig | None = None

def run(config, context):
    context.metrics(0, {"loss": 1.0})

if __name__ == "__main__":
    kind = StageKind(schema="toy:ToyConfig", run="toy:run", outputs={})
    run_dir = Path("trial").resolve()
    (run_dir / "rl").mkdir(parents=True)
    config = {"trackers": {"tensorboard": True}}
    job = StageJob("rl", kind, config, run_dir / "rl", run_dir / "events.jsonl", 0, False, ".")
    raise SystemExit(run_stage(job).error or 0)
"""


@pytest.mark.slow
def test_a_stages_process_hands_its_metrics_on(tmp_path: Path):
    """To TensorBoard itself where it is installed; else the event says that it could not."""
    (tmp_path / "toy.py").write_text(STAGE_MODULE)
    subprocess.run([sys.executable, "toy.py"], cwd=tmp_path, check=True, timeout=120)
    run_dir = tmp_path / "trial"
    context = StageContext("rl", run_dir / "rl", run_dir / "events.jsonl")
    if "tensorboard" in MISSING:
        assert [name for name, _ in failures(context)] == ["tensorboard"]
    else:
        assert list((run_dir / "rl" / "tensorboard").glob("events.out.tfevents.*"))


# ---------------------------------------------------------------- config

STAGE = {"name": "first", "kind": "base", "config": {"steps": 5}}


def pipeline(trackers: Any = None, own: Any = None) -> dict[str, Any]:
    stage = {**STAGE, "config": {"steps": 5, **({"trackers": own} if own is not None else {})}}
    return {"name": "p", "stages": [stage], **({"trackers": trackers} if trackers is not None else {})}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.pipeline.packages.find_spec", lambda name: object())


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_said_before_anything_starts(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.pipeline.packages.find_spec", lambda found: None if found == name else object())
    message = f"trackers.{name}: {name} is not installed: pip install {name}"
    with pytest.raises(ConfigError) as error:
        load_pipeline(pipeline(ALL))
    assert error.value.problems == [message]  # once, not for each stage
    with pytest.raises(ConfigError) as error:
        load_pipeline(pipeline(own=ALL))
    assert [problem.startswith(f"first.{message}") for problem in error.value.problems] == [True]


def test_the_pipelines_trackers_are_of_stages_that_name_none(installed: None):
    both = load_pipeline(pipeline({"tensorboard": True}, own={"trackio": {"project": "x"}})).nodes["first"].config
    assert both.trackers.packages == ["trackio"]
    off = load_pipeline(pipeline({"tensorboard": True}, own={})).nodes["first"].config
    assert off.trackers.packages == []
    given = load_pipeline(pipeline({"tensorboard": True})).nodes["first"].config
    assert given.trackers.packages == ["tensorboard"]


def test_an_override_turns_one_on_without_training_again(installed: None):
    plain = load_pipeline(pipeline())
    with_one = load_pipeline(pipeline(), ["trackers.wandb.project=mine"])
    config: Any = with_one.nodes["first"].config
    assert (config.trackers.wandb.project, config.trackers.wandb.mode) == ("mine", "offline")
    assert input_hash(plain.nodes["first"], plain, {}) == input_hash(with_one.nodes["first"], with_one, {})
