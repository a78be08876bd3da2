"""The pipeline: which stages ran, when and for how long, and the outputs of each."""

import math

from posttrain.report.blocks import Chart, Key, Section, Table
from posttrain.report.charts import axis, escape, rows_figure, text_width
from posttrain.report.format import NONE, seconds
from posttrain.report.read import Run, Stage

STATUS = {"skipped": "done"}  # a skipped stage was done by an earlier call
STATUS_COLOUR = {"done": "--accent", "skipped": "--accent", "failed": "--bad", "interrupted": "--c2"}
HIDDEN = {"config.yaml", "log.txt", "DONE", "STARTED", "metrics.jsonl"}
LONG_PAUSE = 0.3  # share of the whole time; a longer pause means that the run was stopped and continued later


def pipeline_section(run: Run) -> Section | None:
    """The section, or None if the run has no stages."""
    if not run.stages:
        return None
    judged = {stage.of: stage.wall_s for stage in run.evaluations}
    rows = [_row(stage, judged.get(stage.name)) for stage in run.stages]
    columns = ("stage", "kind", "status", "time", "evaluation", "in the run directory")
    table = Table(columns, rows, numeric=(3, 4))
    return Section("pipeline", "Pipeline", [*_gantt(run), table])


def _row(stage: Stage, judged_s: float | None) -> tuple[str, ...]:
    status = STATUS.get(stage.status, stage.status)
    return (stage.name, stage.kind, status, seconds(stage.wall_s), seconds(judged_s), _left(stage))


def _gantt(run: Run) -> list[Chart]:
    """One row for each stage, with its evaluation in the same row, in seconds since the first stage began."""
    shown = [s for s in (*run.stages, *run.evaluations) if s.start is not None and s.wall_s is not None]
    rows = [stage.name for stage in run.stages if any(stage.name in (s.name, s.of) for s in shown)]
    if not rows:
        return []
    begins, pauses = _begins(shown)
    bars = [_bars([s for s in shown if not s.of], begins), _bars([s for s in shown if s.of], begins)]
    span = max(begins[s.name] + (s.wall_s or 0.0) for s in shown) or 1.0
    times = {s.name: seconds(s.wall_s) for s in shown}
    right = 8 + math.ceil(max(text_width(text, 11.5) for text in times.values()))
    notes = [
        {"xref": "paper", "x": 1, "xanchor": "right", "xshift": right - 4, "y": escape(row), "text": times.get(row, ""),
         "showarrow": False, "align": "right", "font": {"size": 11.5, "color": "--muted"}}
        for row in rows
    ]  # fmt: skip
    words = "seconds of work, without the pauses of the run" if pauses else "seconds since the first stage began"
    x = axis(words, range=[0, span * 1.005])
    spec = rows_figure(bars, x, rows, annotations=notes, barmode="overlay", bargap=0.45, margin={"r": right})
    keys = [Key("the stage", "--accent", "box"), Key("its evaluation", "--faint", "box")] if run.evaluations else []
    return [Chart("", spec, 60 + 32 * len(rows), keys=keys)]


def _begins(stages: list[Stage]) -> tuple[dict[str, float], bool]:
    """(where each bar begins in seconds, whether pauses were left out).

    A run that was continued later has long pauses; its stages are then drawn one right after the other.
    """
    ordered = sorted(stages, key=lambda stage: stage.start or 0.0)
    zero = ordered[0].start or 0.0
    begins = {stage.name: (stage.start or 0.0) - zero for stage in ordered}
    span = max(begins[stage.name] + (stage.wall_s or 0.0) for stage in ordered)
    if span - sum(stage.wall_s or 0.0 for stage in ordered) <= LONG_PAUSE * span:
        return begins, False
    at = 0.0
    for stage in ordered:
        begins[stage.name] = at
        at += stage.wall_s or 0.0
    return begins, True


def _bars(stages: list[Stage], begins: dict[str, float]) -> dict:
    faint = any(stage.of for stage in stages)
    return {
        "type": "bar",
        "orientation": "h",
        "y": [escape(stage.of or stage.name) for stage in stages],
        "x": [round(stage.wall_s or 0.0, 2) for stage in stages],
        "base": [round(begins[stage.name], 2) for stage in stages],
        "marker": {
            "color": ["--faint" if faint else STATUS_COLOUR.get(stage.status, "--faint") for stage in stages],
            "line": {"width": 0},
        },
        "text": [f"{escape(stage.name)}: {seconds(stage.wall_s)}" for stage in stages],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }


def _left(stage: Stage) -> str:
    """The names of the stage's outputs; the name of a folder ends with a slash."""
    if not stage.dir.is_dir():
        return NONE
    found = sorted(p.name + "/" * p.is_dir() for p in stage.dir.iterdir() if p.name not in HIDDEN and p.name[0] != ".")
    return ", ".join(found[:6]) + (" …" if len(found) > 6 else "") if found else NONE
