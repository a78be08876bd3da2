"""The result: held-out accuracy by capability after each stage, and what its change consists of."""

from collections.abc import Mapping
from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Table, Text
from posttrain.report.charts import axis, dots, escape, figure, rounded
from posttrain.report.format import NONE
from posttrain.report.read import Run, mapping, number
from posttrain.report.statements import (
    Share,
    change_sentence,
    changes,
    gain_sentences,
    greedy,
    label,
    main_change,
    observed,
    properties,
    share_of,
)

RING_SHIFT = 0.2  # how far right of its stage a pass@k ring is drawn, where 1 is the distance to the next stage


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
        gain_sentences(run),
        [change_sentence(run, before, after, change=change) for before, after, change in others],
    )
    keys = [Key("greedy", "--accent", "dot"), Key(f"{at_k}, sampled", "--muted", "ring")]
    blocks = [
        *([Text(gains)] if gains else []),
        Grid([_panel(run, names, capability, at_k=at_k) for capability in capabilities], min_width=250, keys=keys),
        *([Text(sentences)] if sentences else []),
        *_observed_tables(run, names, capabilities),
        *_tables(run, names, capabilities, at_k=at_k),
    ]
    lead = ["After each stage, on problems held out from training, with 95% intervals."]
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


def _panel(run: Run, names: list[str], capability: str, *, at_k: str) -> Chart:
    """One capability: greedy accuracy after each stage, joined by a line, with pass@k as a ring beside each."""
    shares = [greedy(run.evals[name], capability) for name in names]
    sampled = [_sampled(run, name, capability, name="pass@k") for name in names]
    points = _points(shares, 0.0, "--accent", name="greedy")
    points |= {"mode": "lines+markers", "line": {"color": "--accent@0.35", "width": 1.5}}
    rings = _points(sampled, RING_SHIFT, "--muted", name=at_k)
    rings["marker"] |= {"symbol": "circle-open", "line": {"width": 1.5}}
    rings["error_y"] |= {"thickness": 1, "width": 0}
    size, sampled_size = _size(shares), _size(sampled)
    unit = f"{size} problems" if size else f"{sampled_size} problems" if sampled_size else ""
    if size and sampled_size and size != sampled_size:
        unit += f", {sampled_size} sampled"
    ticks = {"tickvals": list(range(len(names))), "ticktext": [escape(label(run, name)) for name in names]}
    x = axis(grid=False, range=[-0.4, len(names) - 0.5], tickfont={"size": 12, "color": "--ink"}, **ticks)
    y = axis(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    title = "All capabilities" if capability == "all" else capability
    return Chart(title, figure([rings, points], x, y), height=210, unit=unit)


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


def _observed_tables(run: Run, names: list[str], capabilities: list[str]) -> list[Table]:
    """How often replies had each property that the evaluation counted, and how often they were right with it and
    without.
    """
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
