"""The result: held-out accuracy by capability after each stage, and the parts of its change."""

import math
from collections.abc import Mapping
from typing import Any

from posttrain.records import EPISODE_COUNTS
from posttrain.report.blocks import Chart, Grid, Key, Section, Table, Text
from posttrain.report.charts import (
    CONTENT_WIDTH,
    axis,
    dots,
    escape,
    figure,
    line,
    rounded,
    shortened,
    text_width,
)
from posttrain.report.format import NONE
from posttrain.report.lineage import ancestor
from posttrain.report.read import Run, mapping, number
from posttrain.report.statements import (
    Share,
    change_sentence,
    changes,
    gain_sentences,
    greedy,
    label,
    main_change,
    modality_sentences,
    observed,
    properties,
    share_of,
)

LABEL_SIZE, LABEL_GAP = 12, 8  # font size of the stages' names below a panel, and space between them, in pixels
MARGINS = 54  # sum of the left and right margins of a panel's plot, in pixels
RING_SHIFT = 0.2  # a pass@k ring is drawn to the right of its stage by this share of the distance between two stages


def result_section(run: Run) -> Section | None:
    """The section, or None if no stage was evaluated."""
    capabilities = capabilities_of(run)
    names = [name for name in run.evals if any(_measured(run, name, c) for c in capabilities)]
    if not names:
        return None
    ks = sorted({round(k) for n in names for c in capabilities if (k := number(_cell(run, n, c).get("k")))})
    at_k = f"pass@{ks[0]}" if len(ks) == 1 else "pass@k"
    main = main_change(run)
    others = [pair for pair in changes(run) if main is None or pair[:2] != main[:2]]
    gains, sentences = (
        [*gain_sentences(run), *modality_sentences(run)],
        [change_sentence(run, before, after, change=change) for before, after, change in others],
    )
    keys = [Key("greedy", "--accent", "dot"), Key(f"{at_k}, sampled", "--muted", "ring")]
    blocks = [
        *([Text(gains)] if gains else []),
        Grid([_panel(run, names, c, at_k=at_k) for c in capabilities], _panel_width(run, names), keys),
        *([Text(sentences)] if sentences else []),
        *_episode_tables(run, names, capabilities),
        *_observed_tables(run, names, capabilities),
        *_tables(run, names, capabilities, at_k=at_k),
    ]
    lead = ["Accuracy after each stage, on problems held out from training, with 95% intervals."]
    if any(ancestor(run, name) for name in names):
        lead.append("A line connects each model with the model from which it was trained.")
    return Section("result", "Held-out accuracy", blocks, lead)


def capabilities_of(run: Run) -> list[str]:
    """The capabilities of all evaluations in order; "all", which is over all of them, comes first."""
    found = dict.fromkeys(c for results in run.evals.values() for c in results if mapping(results[c]))
    return [*(["all"] if "all" in found else []), *(c for c in found if c != "all")]


def _cell(run: Run, stage: str, capability: str) -> Mapping[str, object]:
    return mapping(run.evals[stage].get(capability))


def _sampled(run: Run, stage: str, capability: str, *, name: str) -> Share | None:
    """pass@1 or pass@k of a stage with its interval."""
    cell = _cell(run, stage, capability)
    return share_of(cell.get(name), cell.get(f"{name}_ci95"), cell.get("pass@k_n", cell.get("n")))


def _measured(run: Run, stage: str, capability: str) -> bool:
    return (
        greedy(run.evals[stage], capability) is not None or _sampled(run, stage, capability, name="pass@k") is not None
    )


def _panel_width(run: Run, names: list[str]) -> int:
    """The smallest width of a panel in pixels at which the names of the stages fit, at most the width of the page."""
    widest = max(text_width(label(run, name), LABEL_SIZE) for name in names) + LABEL_GAP
    return math.ceil(min(max(250.0, MARGINS + widest * (len(names) - 0.1)), CONTENT_WIDTH))


def _labels(run: Run, names: list[str]) -> list[str]:
    """The names of the stages below a panel, cut if they are too long."""
    room = (_panel_width(run, names) - MARGINS) / (len(names) - 0.1) - LABEL_GAP
    return [escape(shortened(label(run, name), room, LABEL_SIZE)) for name in names]


def _panel(run: Run, names: list[str], capability: str, *, at_k: str) -> Chart:
    """One capability: greedy accuracy after each stage, with pass@k as a ring beside each.

    A line leads to each point from the point of the model's nearest ancestor that has one.
    """
    shares = [greedy(run.evals[name], capability) for name in names]
    sampled = [_sampled(run, name, capability, name="pass@k") for name in names]
    points = _points(shares, 0.0, "--accent", name="greedy")
    lines = {**line(*_lines(run, names, shares), "--accent@0.35", name="", width=1.5), "hoverinfo": "skip"}
    rings = _points(sampled, RING_SHIFT, "--muted", name=at_k)
    rings["marker"] |= {"symbol": "circle-open", "line": {"width": 1.5}}
    rings["error_y"] |= {"thickness": 1, "width": 0}
    size, sampled_size = _size(shares), _size(sampled)
    unit = f"{size} problems" if size else f"{sampled_size} problems" if sampled_size else ""
    if size and sampled_size and size != sampled_size:
        unit += f", {sampled_size} sampled"
    ticks = {"tickvals": list(range(len(names))), "ticktext": _labels(run, names), "tickangle": 0}
    x = axis(grid=False, range=[-0.4, len(names) - 0.5], tickfont={"size": LABEL_SIZE, "color": "--ink"}, **ticks)
    y = axis(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    title = "All capabilities" if capability == "all" else capability
    return Chart(title, figure([lines, rings, points], x, y), height=210, unit=unit)


def _lines(run: Run, names: list[str], shares: list[Share | None]) -> tuple[list[float | None], list[float | None]]:
    """x and y of a line from each point's ancestor to it, with a gap after each line."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for i, name in enumerate(names):
        start, share = ancestor(run, name), shares[i]
        at = names.index(start) if start is not None and start in names else None
        origin = shares[at] if at is not None else None
        if share is not None and origin is not None:
            xs += [at, i, None]
            ys += [origin.value, share.value, None]
    return xs, rounded(ys)


def _points(shares: list[Share | None], shift: float, colour: str, *, name: str) -> dict[str, Any]:
    """A marker with its interval for each stage, `shift` to the right of the stage's place."""
    places = [i + shift for i in range(len(shares))]
    values = rounded([None if s is None else s.value for s in shares])
    trace = dots(places, values, colour, name=name, hover="%{y:.1%}", size=8)
    trace["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": rounded([None if s is None else s.high - s.value for s in shares]),
        "arrayminus": rounded([None if s is None else s.value - s.low for s in shares]),
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }
    return trace


def _size(shares: list[Share | None]) -> int | None:
    """The number of problems that all shares were measured on; None if they differ."""
    counts = {share.n for share in shares if share is not None}
    return counts.pop() if len(counts) == 1 else None


def _tables(run: Run, names: list[str], capabilities: list[str], *, at_k: str) -> list[Table]:
    """One table for each measure, with a row for each capability and a column for each stage."""
    tables = []
    for title, measure in (("Greedy accuracy", "greedy"), (at_k, "pass@k"), ("pass@1", "pass@1")):
        rows = []
        for capability in capabilities:
            shares = [
                greedy(run.evals[name], capability)
                if measure == "greedy"
                else _sampled(run, name, capability, name=measure)
                for name in names
            ]
            count = next((str(share.n) for share in shares if share and share.n), NONE)
            if any(shares):
                rows.append((capability, count, *(str(share) if share else NONE for share in shares)))
        if rows:
            columns = ("capability", "problems", *(label(run, name) for name in names))
            strong = [i for i, row in enumerate(rows) if row[0] == "all"]
            tables.append(Table(columns, rows, range(1, len(columns)), strong, title, folded=measure != "greedy"))
    return tables


def _episode_tables(run: Run, names: list[str], capabilities: list[str]) -> list[Table]:
    """Tables of what happened in the episodes of the evaluations: over all, and by capability."""
    tables = []
    for capability in capabilities:
        rows = []
        for name in names:
            found = mapping(_cell(run, name, capability).get("episodes"))
            if (count := number(found.get("n"))) is not None:
                means = [number(found.get(key)) for key in EPISODE_COUNTS]
                shown = (NONE if mean is None else f"{mean:.2f}" for mean in means)
                rows.append((label(run, name), f"{count:g}", *shown))
        if rows:
            columns = ("after", "episodes", *(key.replace("_", " ") for key in EPISODE_COUNTS))
            title = "Episodes, means" + ("" if capability == "all" else f": {capability}")
            tables.append(Table(columns, rows, range(1, len(columns)), title=title, folded=capability != "all"))
    return tables


def _observed_tables(run: Run, names: list[str], capabilities: list[str]) -> list[Table]:
    """Tables of each property that the evaluation counted: its share, and the accuracy with and without it."""
    tables = []
    for key, words in properties(run).items():
        seen = [(name, found) for name in names if (found := observed(run.evals[name], key))]
        rows = [(label(run, n), *(str(s) if s else NONE for s in (f.share, f.accuracy, f.otherwise))) for n, f in seen]
        if rows:
            columns = ("after", "share of replies", "accuracy among them", "accuracy of the others")
            tables.append(Table(columns, rows, (1, 2, 3), title=f"Replies that {words}"))
        by_capability = [
            (c, *(str(f.share) if (f := observed(run.evals[name], key, c)) else NONE for name in names))
            for c in capabilities
            if c != "all" and any(observed(run.evals[name], key, c) for name in names)
        ]
        if by_capability:
            columns = ("capability", *(label(run, name) for name in names))
            title = f"Share of replies that {words}, by capability"
            tables.append(Table(columns, by_capability, range(1, len(columns)), title=title, folded=True))
    return tables
