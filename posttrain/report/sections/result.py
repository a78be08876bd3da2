"""The result: held-out accuracy by capability after each stage, and what its change consists of."""

from collections.abc import Mapping
from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Table, Text
from posttrain.report.charts import axis, escape, figure, rounded
from posttrain.report.format import percent
from posttrain.report.read import Run, mapping, number
from posttrain.report.statements import (
    OBSERVED,
    change_sentence,
    changes,
    gain_sentences,
    greedy,
    label,
    main_change,
    observed,
)


def result_section(run: Run) -> Section | None:
    """Nothing when no stage was evaluated."""
    names = [name for name, results in run.evals.items() if any(greedy(results, c) for c in results)]
    if not names:
        return None
    capabilities = capabilities_of(run)
    panels = [_panel(run, names, capability) for capability in capabilities]
    ks = sorted({round(k) for n in names for c in capabilities if (k := number(_cell(run, n, c).get("k")))})
    at_k = f"pass@{ks[0]}" if len(ks) == 1 else "pass@k"
    keys = [Key("greedy accuracy, with 95% interval", "--accent", "dot")]
    if any(number(_cell(run, n, c).get("pass@k")) is not None for n in names for c in capabilities):
        keys.append(Key(f"{at_k}, sampled", "--muted", "ring"))
    main = main_change(run)
    others = [pair for pair in changes(run) if main is None or pair[:2] != main[:2]]
    blocks = [
        *([Text(gain)] if (gain := gain_sentences(run)) else []),
        Grid(panels, min_width=250, keys=keys),
        *([Text([change_sentence(run, *pair) for pair in others])] if others else []),
        _table(run, names, capabilities, at_k),
        *_observed_table(run, names),
    ]
    return Section("result", "Held-out accuracy after each stage", blocks)


def capabilities_of(run: Run) -> list[str]:
    """The capabilities that any evaluation knows, in order, all of them together first."""
    found = dict.fromkeys(c for results in run.evals.values() for c in results if mapping(results[c]))
    return [*(["all"] if "all" in found else []), *(c for c in found if c != "all")]


def _cell(run: Run, stage: str, capability: str) -> Mapping[str, Any]:
    return mapping(run.evals[stage].get(capability))


def _panel(run: Run, names: list[str], capability: str) -> Chart:
    """One capability: a point with its interval for each stage, joined by a line, and pass@k as a ring."""
    labels = [escape(label(run, name)) for name in names]
    shares = [greedy(run.evals[name], capability) for name in names]
    values = [None if s is None else s.value for s in shares]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": labels,
            "y": rounded(values),
            "line": {"color": "--accent@0.35", "width": 1.5},
            "marker": {"color": "--accent", "size": 8},
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": rounded([None if s is None else s.high - s.value for s in shares]),
                "arrayminus": rounded([None if s is None else s.value - s.low for s in shares]),
                "color": "--accent",
                "thickness": 1.5,
                "width": 4,
            },
            "hovertemplate": "%{x}: %{y:.1%} greedy<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": labels,
            "y": rounded([number(_cell(run, name, capability).get("pass@k")) for name in names]),
            "marker": {"color": "--muted", "size": 8, "symbol": "circle-open", "line": {"width": 1.5}},
            "hovertemplate": "%{x}: %{y:.1%} pass@k<extra></extra>",
        },
    ]
    counts = sorted({s.n for s in shares if s is not None})
    title = "All capabilities" if capability == "all" else capability
    size = f"{counts[0]} problems" if len(counts) == 1 else ""
    y = axis(range=[0, 1.04], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    x = axis(grid=False, type="category", range=[-0.4, len(labels) - 0.6], tickfont={"size": 12, "color": "--ink"})
    return Chart(title, figure(data, x, y), height=220, caption=size)


def _table(run: Run, names: list[str], capabilities: list[str], at_k: str) -> Table:
    rows, strong = [], []
    for capability in capabilities:
        for name in names:
            share = greedy(run.evals[name], capability)
            if share is None:
                continue
            cell = _cell(run, name, capability)
            first = ("all" if capability == "all" else capability) if name == names[0] else ""
            if capability == "all":
                strong.append(len(rows))
            interval = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
            shares = (
                f"{100 * share.value:.1f}%",
                interval,
                percent(cell.get("pass@1"), 1),
                percent(cell.get("pass@k"), 1),
            )
            rows.append((first, label(run, name), str(share.n), *shares))
    columns = ("capability", "after", "problems", "greedy", "95% interval", "pass@1", at_k)
    return Table(columns, rows, numeric=(2, 3, 4, 5, 6), strong=strong)


def _observed_table(run: Run, names: list[str]) -> list[Table]:
    """How often replies had each property that the evaluation counted, and were right when they had it."""
    tables = []
    for key, words in OBSERVED.items():
        rows = []
        for name in names:
            if seen := observed(run.evals[name], key):
                rows.append((label(run, name), str(seen.share), str(seen.accuracy) if seen.accuracy else "–"))
        if rows:
            columns = ("after", f"share of replies that {words}", "accuracy among them")
            tables.append(Table(columns, rows, numeric=(1, 2), caption="Greedy replies to the held-out problems."))
    return tables
