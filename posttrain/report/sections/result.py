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


def result_section(run: Run) -> Section | None:
    """Nothing when no stage was evaluated."""
    capabilities = capabilities_of(run)
    names = [name for name in run.evals if any(_measured(run, name, c) for c in capabilities)]
    if not names:
        return None
    ks = sorted({round(k) for n in names for c in capabilities if (k := number(_cell(run, n, c).get("k")))})
    at_k = f"pass@{ks[0]}" if len(ks) == 1 else "pass@k"
    main = main_change(run)
    others = [pair for pair in changes(run) if main is None or pair[:2] != main[:2]]
    gains, sentences = gain_sentences(run), [change_sentence(run, *pair) for pair in others]
    keys = [Key("greedy", "--accent", "dot"), Key(f"{at_k}, sampled", "--muted", "ring")]
    blocks = [
        *([Text(gains)] if gains else []),
        Grid([_panel(run, names, capability, at_k) for capability in capabilities], min_width=250, keys=keys),
        *([Text(sentences)] if sentences else []),
        *_observed_tables(run, names),
        *_tables(run, names, capabilities, at_k),
    ]
    lead = ["After each stage, on problems held out from training, with 95% intervals."]
    return Section("result", "Held-out accuracy", blocks, lead)


def capabilities_of(run: Run) -> list[str]:
    """The capabilities that any evaluation knows, in order, all of them together first."""
    found = dict.fromkeys(c for results in run.evals.values() for c in results if mapping(results[c]))
    return [*(["all"] if "all" in found else []), *(c for c in found if c != "all")]


def _cell(run: Run, stage: str, capability: str) -> Mapping[str, Any]:
    return mapping(run.evals[stage].get(capability))


def _sampled(run: Run, stage: str, capability: str, name: str) -> Share | None:
    """pass@1 or pass@k with its interval."""
    cell = _cell(run, stage, capability)
    return share_of(cell.get(name), cell.get(f"{name}_ci95"), cell.get(f"{name}_n", cell.get("n")))


def _measured(run: Run, stage: str, capability: str) -> bool:
    return greedy(run.evals[stage], capability) is not None or _sampled(run, stage, capability, "pass@k") is not None


def _panel(run: Run, names: list[str], capability: str, at_k: str) -> Chart:
    """One capability: a point with its interval for each stage, joined by a line, and pass@k as a ring."""
    labels = [escape(label(run, name)) for name in names]
    shares = [greedy(run.evals[name], capability) for name in names]
    sampled = [_sampled(run, name, capability, "pass@k") for name in names]
    rings = dots(labels, _values(sampled), "--muted", at_k, "%{x}: %{y:.1%}", 8)
    rings["marker"] |= {"symbol": "circle-open", "line": {"width": 1.5}}
    points = dots(labels, _values(shares), "--accent", "greedy", "%{x}: %{y:.1%}", 8)
    points |= {"mode": "lines+markers", "line": {"color": "--accent@0.35", "width": 1.5}}
    points["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": rounded([None if s is None else s.high - s.value for s in shares]),
        "arrayminus": rounded([None if s is None else s.value - s.low for s in shares]),
        "color": "--accent",
        "thickness": 1.5,
        "width": 4,
    }
    counts = sorted({s.n for s in shares if s is not None})
    size = f"{counts[0]} problems" if len(counts) == 1 else ""
    title = "All capabilities" if capability == "all" else capability
    y = axis(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    x = axis(grid=False, type="category", range=[-0.4, len(labels) - 0.6], tickfont={"size": 12, "color": "--ink"})
    return Chart(title, figure([rings, points], x, y), height=210, unit=size)


def _values(shares: list[Share | None]) -> list[float | None]:
    return rounded([None if share is None else share.value for share in shares])


def _tables(run: Run, names: list[str], capabilities: list[str], at_k: str) -> list[Table]:
    """One table a measure: capabilities down, stages across."""
    tables = []
    for title, measure in (("Greedy accuracy", "greedy"), (at_k, "pass@k"), ("pass@1", "pass@1")):
        rows = []
        for capability in capabilities:
            shares = [
                greedy(run.evals[name], capability) if measure == "greedy" else _sampled(run, name, capability, measure)
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


def _observed_tables(run: Run, names: list[str]) -> list[Table]:
    """How often replies had each property that the evaluation counted, and were right with it and without."""
    tables = []
    for key, words in properties(run).items():
        seen = [(name, found) for name in names if (found := observed(run.evals[name], key))]
        rows = [(label(run, n), *(str(s) if s else NONE for s in (f.share, f.accuracy, f.otherwise))) for n, f in seen]
        columns = ("after", "share of replies", "accuracy among them", "accuracy of the others")
        if rows:
            tables.append(Table(columns, rows, (1, 2, 3), title=f"Replies that {words}"))
    return tables
