"""SFT and DPO: the loss, and how light the stage was: tokens seen, distance from the base, entropy kept."""

import json
from collections import Counter
from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Stat, Stats, Table
from posttrain.report.charts import axis, dots, figure, line, smooth, smoothing
from posttrain.report.format import NONE, count, plain
from posttrain.report.read import Run, Stage, number
from posttrain.report.series import Series

# What the two stages may call a thing, the preferred name first.
TOKENS = ("tokens", "num_tokens", "tokens_seen")
KL = ("kl_from_base", "kl_base", "kl")
ENTROPY = ("entropy", "entropy_after", "mean_entropy")
MARGIN = ("margin", "rewards/margins", "reward_margin")
ACCURACY = ("accuracy", "rewards/accuracies", "reward_accuracy")


def sft_section(run: Run, stage: Stage) -> Section | None:
    series = Series(stage.metrics)
    if not series and not stage.outputs:
        return None
    charts = [_curve(series, "Loss on assistant tokens", ("loss",))]
    charts.append(_curve(series, "KL from the base, nats a token", KL))
    charts.append(_curve(series, "Entropy, nats a token", ENTROPY))
    charts.append(_curve(series, "Learning rate", ("learning_rate",), average=False))
    return _section(stage, "Light SFT", [Stats(_light(stage, series))], charts)


def dpo_section(run: Run, stage: Stage) -> Section | None:
    series = Series(stage.metrics)
    pairs = _pairs(stage)
    if not series and not pairs and not stage.outputs:
        return None
    charts = [_curve(series, "Loss", ("loss",))]
    charts.append(_curve(series, "Reward margin, chosen over rejected", MARGIN))
    charts.append(_curve(series, "Share of pairs ranked right", ACCURACY, tickformat=".0%", range=[0, 1.04]))
    stats = [Stat("preference pairs", count(sum(pairs.values())))] if pairs else []
    stats += _light(stage, series)
    blocks: list[Any] = [Stats(stats)] if stats else []
    if len(pairs) > 1 or (pairs and "" not in pairs):
        kinds = [(kind or "other", count(amount)) for kind, amount in pairs.most_common()]
        blocks.append(Table(("pairs mined from the rollouts", "pairs"), kinds, numeric=(1,)))
    return _section(stage, "Light DPO", blocks, charts)


def _section(stage: Stage, title: str, blocks: list[Any], charts: list[Chart | None]) -> Section | None:
    drawn = [chart for chart in charts if chart is not None]
    blocks = [block for block in blocks if not isinstance(block, Stats) or block.items]
    if drawn:
        blocks.append(Grid(drawn))
    return Section(stage.name, title, blocks) if blocks else None


def _curve(series: Series, title: str, names: tuple[str, ...], average: bool = True, **settings: Any) -> Chart | None:
    """One column over the steps, or nothing when it was not written or is a single point."""
    values = series.get(*names)
    if len(series.known(*names)) < 2:
        return None
    width = smoothing(len(values)) if average else 1
    data = [line(series.steps, values, "--accent", title)]
    keys: tuple[Key, ...] = ()
    if width > 1:
        data = [
            dots(series.steps, values, "--accent@0.35", "one step"),
            line(series.steps, smooth(values, width), "--accent", f"mean of {width} steps"),
        ]
        keys = (Key("one step", "--accent@0.35", "dot"), Key(f"mean of {width} steps", "--accent"))
    return Chart(title, figure(data, axis("step", grid=False), axis("", **settings)), 200, keys=keys)


def _light(stage: Stage, series: Series) -> list[Stat]:
    """How much the stage moved the policy, from its last metrics or its outputs."""
    stats = []
    tokens = _value(stage, series, TOKENS)
    if tokens is not None:
        stats.append(Stat("tokens seen", count(tokens), _steps(series)))
    elif len(series):
        stats.append(Stat("steps", count(len(series))))
    if (kl := _value(stage, series, KL)) is not None:
        stats.append(Stat("KL from base", plain(kl), "nats a token"))
    before = number(stage.outputs.get("entropy_before"))
    before = series.first(*ENTROPY) if before is None else before
    after = _value(stage, series, ENTROPY)
    if before is not None and after is not None and (before != after or len(series.known(*ENTROPY)) > 1):
        stats.append(Stat("entropy", f"{plain(before)} → {plain(after)}", "nats a token, before and after"))
    elif after is not None:
        stats.append(Stat("entropy", plain(after), "nats a token"))
    if (loss := series.last("loss")) is not None:
        stats.append(Stat("loss", f"{plain(series.first('loss'))} → {plain(loss)}", "first and last step"))
    return [stat for stat in stats if stat.value != NONE]


def _steps(series: Series) -> str:
    return f"in {count(len(series))} steps" if len(series) else ""


def _value(stage: Stage, series: Series, names: tuple[str, ...]) -> float | None:
    for name in names:
        if (value := number(stage.outputs.get(name))) is not None:
            return value
    return series.last(*names)


def _pairs(stage: Stage) -> Counter[str]:
    """Pairs by what sets the chosen reply apart from the rejected one."""
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
                kinds[str(pair.get("kind") or pair.get("reason") or "")] += 1
    return kinds
