"""The timeline of engines, rewards and trainer: a row for each actor, a colour for each kind of work, the overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.blocks import Chart, Key, Section, Stat, Stats
from posttrain.report.busy import Overlap, length, measure_overlap, union
from posttrain.report.charts import axis, escape, rows_figure
from posttrain.report.format import percent, seconds
from posttrain.report.read import Run, Stage

WORK = {
    "generate": ("generating", "--c1"),
    "train": ("training", "--c2"),
    "update_weights": ("updating weights", "--c4"),
    "score": ("scoring", "--c3"),
}
MAX_BARS = 2500


def timeline_section(run: Run, stage: Stage) -> Section | None:
    """The section, or None if the stage recorded no busy times."""
    busy = run.busy(stage)
    if not busy:
        return None
    overlap = measure_overlap(busy)
    lead = [_sentence(overlap)] if overlap else []
    blocks = [*([Stats(_stats(overlap))] if overlap else []), _chart(busy, stage)]
    return Section(f"{stage.name}-timeline", "When each actor was busy", blocks, lead)


def _sentence(overlap: Overlap) -> str:
    met = "meets" if overlap.share >= overlap.goal else "misses"
    return (
        f"Between the first and the last optimizer step, generation and training ran at the same time for "
        f"{percent(overlap.share)} of the {seconds(overlap.window_s)}. With perfect overlap it would be "
        f"{percent(overlap.best)}. The run {met} the goal of {percent(overlap.goal)}, which is 0.8 of that."
    )


def _stats(overlap: Overlap) -> list[Stat]:
    return [
        Stat("T_gen", f"{overlap.gen_s:.1f} s", "generation was running"),
        Stat("T_train", f"{overlap.train_s:.1f} s", "training was running"),
        Stat("overlap", f"{overlap.both_s:.1f} s", "both were running"),
        Stat("first to last step", f"{overlap.window_s:.1f} s"),
    ]


def _chart(busy: Sequence[Mapping[str, Any]], stage: Stage) -> Chart:
    zero = min([event["start"] for event in busy] + ([stage.start] if stage.start is not None else []))
    end = max(event["end"] for event in busy)
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in busy:
        rows.setdefault((str(event.get("actor", "?")), str(event.get("what", "busy"))), []).append(
            (event["start"] - zero, event["end"] - zero)
        )
    gap = 0.0
    merged = {key: union(spans) for key, spans in rows.items()}
    while sum(map(len, merged.values())) > MAX_BARS:
        gap = max(2 * gap, (end - zero) / 5000)
        merged = {key: union(spans, gap) for key, spans in rows.items()}
    actors = list(dict.fromkeys(actor for actor, _ in merged))
    kinds = list(dict.fromkeys(what for _, what in merged))
    # Weight updates are short. They are drawn last, so that they are visible on top of the long bars.
    kinds.sort(key=lambda what: -max(length(s) for (_, w), s in merged.items() if w == what))
    traces = [_trace(what, merged) for what in kinds]
    x = axis("seconds of the stage", fixedrange=False, range=[0, (end - zero) * 1.01])
    spec = rows_figure(traces, x, actors, barmode="overlay", bargap=0.3, dragmode="zoom")
    caption = "Drag to zoom in, double-click to zoom out."
    if gap:
        caption += f" Pauses shorter than {seconds(gap)} are not drawn."
    keys = [Key(_work(what)[0], _work(what)[1], "box") for what in kinds]
    return Chart("", spec, 60 + 44 * len(actors), caption=caption, keys=keys)


def _work(what: str) -> tuple[str, str]:
    return WORK.get(what, (what.replace("_", " "), "--faint"))


def _trace(what: str, merged: Mapping[tuple[str, str], list[tuple[float, float]]]) -> dict[str, Any]:
    words, colour = _work(what)
    spans = [(actor, start, end) for (actor, w), found in merged.items() if w == what for start, end in found]
    return {
        "type": "bar",
        "orientation": "h",
        "name": words,
        "y": [escape(actor) for actor, _, _ in spans],
        "base": [round(start, 3) for _, start, _ in spans],
        "x": [round(end - start, 3) for _, start, end in spans],
        "marker": {"color": colour, "line": {"width": 0.5, "color": colour}},
        "hovertemplate": f"{escape(words)}: %{{x:.2f}} s from %{{base:.1f}} s<extra></extra>",
    }
