"""The pass rates of the prompts: from a profile, with the band from which RL chose, or from the first groups of RL."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.metrics.unscored import kinds_text
from posttrain.report.blocks import Chart, Key
from posttrain.report.charts import axis, bars, figure
from posttrain.report.format import count, plain
from posttrain.report.read import Run, Stage, number

MAX_BARS = 17


def profile_chart(run: Run, stage: Stage) -> Chart | None:
    """A histogram of pass rates, selected and left out, with the band shaded; None if none were measured."""
    path = stage.dir / "difficulty.parquet"
    if not path.is_file():
        return None
    import pyarrow.parquet as parquet

    rows = parquet.read_table(path).to_pylist()
    measured = [(rate, bool(row.get("selected"))) for row in rows if (rate := number(row.get("pass_rate"))) is not None]
    if not measured:
        return None
    sizes = {round(n) for row in rows if (n := number(row.get("samples") or row.get("n")))}
    bins = min(max(sizes, default=MAX_BARS - 1), MAX_BARS - 1)
    centres = [round(i / bins, 4) for i in range(bins + 1)]
    counts = {True: [0] * (bins + 1), False: [0] * (bins + 1)}
    for rate, chosen in measured:
        counts[chosen][round(min(max(rate, 0.0), 1.0) * bins)] += 1
    data = [
        bars(centres, counts[True], "--accent", name="selected", hover="%{y} prompts"),
        bars(centres, counts[False], "--faint", name="left out", hover="%{y} prompts"),
    ]
    low, high = (number(rows[0].get(name)) for name in ("band_low", "band_high"))
    x = axis("share of replies that pass", grid=False, tickformat=".0%", range=[-0.06, 1.06])
    spec = figure(data, x, axis(), barmode="stack", bargap=0.12, shapes=_band(low, high))
    chosen = sum(chosen for _, chosen in measured)
    tries = f", {sizes.pop()} replies each" if len(sizes) == 1 else ""
    is_profile = stage.figures.get("profile") is not None or low is not None
    if is_profile:
        caption = f"{count(chosen)} of {count(len(rows))} prompts selected{tries}."
    else:
        caption = f"{count(len(rows))} prompts were drawn: the first group of each, with the policy of its time."
    if lost := unscored_prompts(rows):
        caption += f" {count(lost.total())} could not be scored ({kinds_text(lost)})."
    if low is not None and high is not None:
        caption += f" Shaded: the band from {plain(low)} to {plain(high)}."
    keys = [Key("selected", "--accent", "box"), Key("left out", "--faint", "box")]
    title = "Difficulty by the policy itself"
    return Chart(f"{title}, before RL" if is_profile else title, spec, 230, "prompts", caption, keys)


def unscored_prompts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """The number of profiled prompts without any scored reply, by reason."""
    return Counter(str(row.get("unscored") or "unknown") for row in rows if number(row.get("n")) == 0)


def _band(low: float | None, high: float | None) -> list[dict]:
    if low is None or high is None:
        return []
    box = {"type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
    return [{**box, "fillcolor": "--accent@0.08", "line": {"width": 0}, "layer": "below"}]
