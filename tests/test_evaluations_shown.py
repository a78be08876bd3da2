"""What evaluations beside an RL training found, as metrics, in the live panel and in the report."""

import json
from pathlib import Path

from test_cli import NODES, event, shown
from test_report import charts_of, copy, sample, write_lines

from posttrain.cli.display import LiveDisplay, RunState
from posttrain.context import StageContext
from posttrain.rl.loop.evaluation import evaluation_metrics

__all__ = ["copy", "sample"]  # fixtures

MEANS = {"n": 4, "turns": 2.5, "tool_calls": 0.0, "malformed_calls": 0.0, "tool_failures": 0.0}


def test_an_evaluation_is_told_in_the_step_in_which_it_has_ended():
    found = {"a": {"accuracy": 0.0}, "b": {"accuracy": 0.5}, "all": {"accuracy": 0.25, "episodes": MEANS}}
    assert evaluation_metrics(7, found) == {
        "evaluation/version": 7,
        "evaluation/accuracy": 0.25,
        "evaluation/accuracy/a": 0.0,
        "evaluation/accuracy/b": 0.5,
        **{f"evaluation/{name}": value for name, value in MEANS.items() if name != "n"},
    }
    assert evaluation_metrics(7, {"all": {"accuracy": None}}) == {"evaluation/version": 7}


def test_the_panel_keeps_what_the_latest_evaluation_found(tmp_path: Path):
    display, file = LiveDisplay(), tmp_path / "events.jsonl"
    display._state = RunState(NODES, file)
    (tmp_path / "rl").mkdir()
    context = StageContext("rl", tmp_path / "rl", file)
    file.write_text(event("rl", "stage_start"))
    context.metrics(0, {"reward_mean": 0.25, "evaluation/version": 0, "evaluation/turns": 2.5})
    context.metrics(1, {"reward_mean": 0.5})
    display.refresh()
    assert "of version 0   turns 2.5" in shown(display)
    assert "mean 0.500" in shown(display)


def test_the_report_draws_evaluations_over_the_versions_that_they_measured(copy: Path):
    lines = [json.loads(line) for line in (copy / "rl" / "metrics.jsonl").open()]
    found = evaluation_metrics(0, {"all": {"accuracy": 0.25, "episodes": MEANS}})
    later = {**found, "evaluation/version": 3, "evaluation/accuracy": 0.5, "evaluation/turns": 2.0}
    assert "In an episode of evaluations" not in charts_of(copy, "rl")
    ended = {1: found, 5: later}
    write_lines(copy / "rl" / "metrics.jsonl", [{**line, **ended.get(at, {})} for at, line in enumerate(lines)])
    charts = charts_of(copy, "rl")
    (accuracy,) = charts["Accuracy of evaluations"].spec["data"]
    assert (accuracy["x"], accuracy["y"]) == ([0, 3], [0.25, 0.5])
    (turns,) = charts["In an episode of evaluations"].spec["data"]
    assert (turns["x"], turns["y"]) == ([0, 3], [2.5, 2.0])
