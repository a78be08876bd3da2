"""The pipeline: which stages ran, when, for how long, and what came out of each."""

from posttrain.report.blocks import Chart, Section, Table
from posttrain.report.charts import axis, escape, figure
from posttrain.report.format import seconds
from posttrain.report.read import Run, Stage

STATUS_COLOUR = {"done": "--accent", "skipped": "--faint", "failed": "--bad", "interrupted": "--c2"}


def pipeline_section(run: Run) -> Section | None:
    if not run.stages:
        return None
    rows = [(stage.name, stage.kind, stage.status, seconds(stage.wall_s), _outputs(run, stage)) for stage in run.stages]
    columns = ("stage", "kind", "status", "time", "in the run directory")
    table = Table(columns, rows, numeric=(3,))
    timed = [stage for stage in run.stages if stage.start is not None and stage.wall_s is not None]
    return Section("pipeline", "Pipeline", [*([_gantt(run, timed)] if timed else []), table])


def _gantt(run: Run, stages: list[Stage]) -> Chart:
    """One bar a stage over the seconds since the first began."""
    zero = min(stage.start or 0.0 for stage in stages)
    ends = [(stage.start or 0.0) - zero + (stage.wall_s or 0.0) for stage in stages]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [escape(stage.name) for stage in stages],
        "x": [round(stage.wall_s or 0.0, 2) for stage in stages],
        "base": [round((stage.start or 0.0) - zero, 2) for stage in stages],
        "marker": {"color": [STATUS_COLOUR.get(stage.status, "--faint") for stage in stages], "line": {"width": 0}},
        "text": [seconds(stage.wall_s) for stage in stages],
        "textposition": "none",
        "hovertemplate": "%{y}: %{text}<extra></extra>",
        "width": 0.5,
    }
    names = [
        {"x": end, "y": escape(stage.name), "text": seconds(stage.wall_s), "showarrow": False, "xanchor": "left",
         "xshift": 6, "font": {"size": 11.5, "color": "--muted"}}
        for stage, end in zip(stages, ends, strict=True)
    ]  # fmt: skip
    span = max(ends) or 1.0
    x = axis("seconds since the first stage began", range=[0, span * 1.12])
    y = axis(grid=False, autorange="reversed", type="category", tickfont={"size": 12, "color": "--ink"})
    return Chart("", figure([bar], x, y, annotations=names, bargap=0.4), height=70 + 34 * len(stages))


def _outputs(run: Run, stage: Stage) -> str:
    """What the stage left, by name: folders with a slash."""
    if not stage.dir.is_dir():
        return "–"
    skip = {"config.yaml", "log.txt", "DONE", "metrics.jsonl"}
    found = sorted(p.name + "/" * p.is_dir() for p in stage.dir.iterdir() if p.name not in skip and p.name[0] != ".")
    return ", ".join(found[:6]) + (" …" if len(found) > 6 else "") if found else "–"
