"""Base, SFT and DPO: the loss, and how much the stage changed the policy: tokens, KL from the start, entropy."""

import json
from collections import Counter
from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Stat, Stats
from posttrain.report.charts import axis, dots, figure, line, smooth, smoothing
from posttrain.report.format import NONE, count, percent, plain, plural
from posttrain.report.read import Run, Stage, number
from posttrain.report.series import Series

LOSS, HELD_OUT = "held_out_loss", "--c2"  # the column, and the colour of all figures on held-out rows
PAIRS = {"wrong": "right over wrong", "truncated": "complete over truncated", "given": "given"}


def base_section(run: Run, stage: Stage) -> Section | None:
    """The section of a base stage, or None without data."""
    series = Series(stage.metrics)
    stats = [Stat("steps", count(series.steps[-1]))] if len(series) else []
    if loss := _first_to_last(series, "loss"):
        stats.append(Stat("loss", loss, "first and last step"))
    return _section(stage, "Base", stats, charts=[_curve(series, "Loss", "loss")])


def sft_section(run: Run, stage: Stage) -> Section | None:
    """The section of an SFT stage, or None without data."""
    series = Series(stage.metrics)
    charts = [
        _curve(series, "Loss on assistant tokens", "loss", apart=LOSS, unit="nats a token", rangemode="tozero"),
        _curve(series, "Entropy on the training rows", "entropy", unit="nats a token", rangemode="tozero"),
    ]
    return _section(stage, "Light SFT", _light(stage, series), charts=charts)


def dpo_section(run: Run, stage: Stage) -> Section | None:
    """The section of a DPO stage, or None without data."""
    series = Series(stage.metrics)
    charts = [
        _curve(series, "Loss", "loss", apart=LOSS),
        _curve(series, "Margin, chosen over rejected", "margin", apart="held_out_margin", unit="implicit reward"),
        _curve(series, "Pairs ranked right", "accuracy", apart="held_out_accuracy", tickformat=".0%", range=[0, 1.05]),
    ]
    pairs = _pairs(stage)
    stats = []
    if pairs:
        kinds = ", ".join(f"{count(amount)} {PAIRS.get(kind, kind)}" for kind, amount in pairs.most_common() if kind)
        stats.append(Stat("preference pairs", count(sum(pairs.values())), kinds))
    return _section(stage, "Light DPO", stats + _light(stage, series), charts=charts)


def _section(stage: Stage, title: str, stats: list[Stat], *, charts: list[Chart | None]) -> Section | None:
    drawn = [chart for chart in charts if chart is not None]
    known = [stat for stat in stats if stat.value != NONE]
    blocks: list[Any] = [*([Stats(known)] if known else []), *([Grid(drawn)] if drawn else [])]
    return Section(stage.name, title, blocks) if blocks else None


def _curve(series: Series, title: str, name: str, *, apart: str = "", unit: str = "", **settings: Any) -> Chart | None:
    """One column over the steps; None if it is missing or has a single point.

    apart: the column with the same measure on held-out rows, which has a value at each evaluation; "" for none.
    """
    values = series.get(name)
    if len(series.known(name)) < 2:
        return None
    width = smoothing(len(values))
    data = [line(series.steps, smooth(values, width), "--accent", name=title)]
    keys: tuple[Key, ...] = ()
    if width > 1:
        data.insert(0, dots(series.steps, values, "--accent@0.35", name="recorded"))
        keys = (Key("recorded", "--accent@0.35", "dot"), Key(f"smoothed over {width}", "--accent"))
    values = series.get(apart) if apart else []
    measured = [(step, value) for step, value in zip(series.steps, values, strict=False) if value is not None]
    if measured:
        steps, shown = zip(*measured, strict=True)
        data.append({**line(steps, shown, HELD_OUT, name="held-out rows"), "mode": "lines+markers"})
        keys = (*(keys or (Key("training rows", "--accent"),)), Key("held-out rows", HELD_OUT))
    spec = figure(data, axis("step", grid=False), axis(**settings))
    return Chart(title, spec, 200, unit, keys=keys)


def _light(stage: Stage, series: Series) -> list[Stat]:
    """How much the stage changed the policy, by the measurements at its end."""

    def at_end(name: str) -> float | None:
        figure_ = number(stage.figures.get(name))
        return series.last(name) if figure_ is None else figure_

    steps = f"in {plural(round(series.steps[-1] or 0), 'step')}" if len(series) else ""
    stats = [Stat("tokens seen", count(at_end("tokens")), steps)]
    stats.append(Stat("KL from the start", plain(at_end("kl_from_start")), "nats a token"))
    before, after = at_end("entropy_before"), at_end("entropy_after")
    if before is not None and after is not None:
        stats.append(Stat("entropy", f"{plain(before)} → {plain(after)}", "nats a token, before and after"))
    if loss := _first_to_last(series, "loss"):
        stats.append(Stat("loss", loss, "first and last step"))
    first, last, best = (at_end(f"{LOSS}_{which}") for which in ("first", "last", "best"))
    if first is not None and last is not None:
        kept, steps_made = at_end("result_step"), at_end("steps") or series.last("step")
        note = "first and last evaluation"
        if kept is not None and steps_made is not None and kept < steps_made:
            note += f"; the result is {f'step {count(kept)}' if kept else 'the start model'}, with {plain(best)}"
        if stage.figures.get("stopped_early"):
            note += "; the training ended early"
        shown = plain(last) if first == last else f"{plain(first)} → {plain(last)}"
        stats.append(Stat("held-out loss", shown, note))
    if (ranked := at_end("accuracy")) is not None:
        stats.append(Stat("pairs ranked right", percent(ranked), "at the end"))
    return stats


def _first_to_last(series: Series, name: str) -> str:
    first, last = series.first(name), series.last(name)
    if first is None or last is None:
        return ""
    return f"{plain(first)} → {plain(last)}" if len(series.known(name)) > 1 else plain(first)


def _pairs(stage: Stage) -> Counter[str]:
    """The number of pairs for each reason why the chosen reply is better than the rejected one."""
    kinds: Counter[str] = Counter()
    path = stage.dir / "pairs.jsonl"
    if not path.is_file():
        return kinds
    with path.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                pair = json.loads(text)
            except ValueError:
                continue
            if isinstance(pair, dict):
                kinds[str(pair.get("reason") or "")] += 1
    return kinds
