"""Real engines that join and leave a real run of RL, and one that is killed; ranks that change between commits."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_rl import make_config, rows_of, run_stage

from posttrain.files import read_jsonl
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.loop import elastic
from posttrain.rl.loop.scaling import Decision
from posttrain.sampling import workers as rollout_workers

# Scores wait while an engine joins or leaves, so that the run cannot end before it has.
HELD = """
import time
from pathlib import Path

def held(rollout, row):
    while (Path(__file__).parent / "hold").exists():
        time.sleep(0.02)
    ids = rollout.token_ids
    return sum(token % 2 == 0 for token in ids) / len(ids) + 1e-3 * (sum(token * token for token in ids) % 997) / 997
"""
ENDS = ("engine_joined", "engine_left", "engine_given_up")


class Script:
    """In the place of `Scaling`: 2 engines, 1, 2, each a few steps after the change before it."""

    def __init__(self, hold: Path):
        self.wanted = [2, 1, 2]
        self.refusals: list[int] = []
        self._hold = hold
        self._steps = 0

    def observe(self, figures, workers, *, is_changing):
        assert 0.0 <= figures.work <= 1.0
        self._steps = 0 if is_changing else self._steps + 1
        if not self.wanted or self._steps < 3:
            return None
        self._hold.touch()
        return Decision(self.wanted.pop(0), "the script says so")

    def refused(self, workers: int) -> None:
        self.refusals.append(workers)


@pytest.mark.slow
@pytest.mark.full  # three engines to start
def test_engines_join_leave_and_are_given_up_while_the_training_goes_on(ranks, tiny_model, tmp_path, monkeypatch):
    hold, folder = tmp_path / "hold", tmp_path / "rl"
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"]),
        steps=24,
        resources={"rollout": {"cpus": 0.5, "workers": {"min": 1, "max": 2}}},
        reward={"name": f"{tmp_path}/held.py:held", "timeout_s": 300.0},
    )
    (tmp_path / "held.py").write_text(HELD)
    script = Script(hold)
    monkeypatch.setattr(elastic, "scaling_of", lambda config: script)
    monkeypatch.setattr(rollout_workers, "MAX_CONSECUTIVE_LOSSES", 1)
    ended = threading.Event()

    def seen() -> list[str]:
        path = folder / "events.jsonl"
        return [line["event"] for line in read_jsonl(path) if line["event"] in ENDS] if path.exists() else []

    def watch() -> None:
        """Let the scores go on after each change. When both engines stand for the second time, one is killed."""
        known = 0
        while not ended.is_set():
            time.sleep(0.05)
            if len(found := seen()) == known:
                continue
            known = len(found)
            if found == [*ENDS[:2], ENDS[0]]:
                newest = max(engines(), key=lambda process: process.create_time())
                newest.send_signal(signal.SIGKILL)
                continue
            hold.unlink(missing_ok=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        _, metrics = run_stage(config, folder, warm=False)
    finally:
        ended.set()
        hold.unlink(missing_ok=True)
        watcher.join()
    assert seen() == ["engine_joined", "engine_left", "engine_joined", "engine_given_up"]
    assert script.refusals == [1]
    events = list(read_jsonl(folder / "events.jsonl"))
    assert [line["workers"] for line in events if line["event"] == "engines_wanted"] == [2, 1, 2]
    joined = [line for line in events if line["event"] == "engine_joined"]
    assert all(0.0 <= line["mean_gap"] < 1e-3 for line in joined)  # compared with the engine that was there
    assert [line["step"] for line in metrics] == list(range(24))
    numbers = [line["engines"] for line in metrics]
    assert [one for one, before in zip(numbers, [0, *numbers], strict=False) if one != before] in (
        [1, 2, 1, 2, 1],
        [1, 2, 1],  # the last one was killed within the step after which it had joined
    )
    assert joined[0]["name"] in {line["engine"] for line in events if line["event"] == "engine_load" and line["tokens"]}
    audit = audit_stage(folder)
    assert audit.is_clean, audit.problems
    assert not list(engines())


@pytest.mark.slow
@pytest.mark.full
def test_a_training_goes_on_from_its_last_commit_on_other_ranks(ranks, tiny_model, tmp_path):
    """One rank, then two that divide the experts and the state by ZeRO 3, then one again."""
    layouts = ({}, {"processes": 2, "expert": 2, "zero": 3}, {"zero": 0})
    for number, layout in enumerate(layouts, 1):
        config = make_config(
            tmp_path,
            tiny_model,
            rows_of(["math"]),
            steps=3 * number,
            max_staleness=0,
            parallel=layout,
            resources={"rollout": {"cpus": 0.5}, "trainer": {"cpus": 0.25}},
        )
        outputs, metrics = run_stage(config, tmp_path / "rl")
        assert outputs["processes"] == layout.get("processes", 1)
        assert outputs["parity_mean_gap"] < 1e-5  # the engines have what the ranks have read
    assert [line["step"] for line in metrics] == list(range(9))
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems


def engines() -> list[psutil.Process]:
    """The processes of engines' actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "EngineActor" in " ".join(process.cmdline()):
                found.append(process)
    return found
