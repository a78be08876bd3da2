"""Online RL: reward over the steps, where the groups went, how stale and how far from the sampler training was."""

from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Stat, Stats
from posttrain.report.charts import axis, bars, dots, figure, line, smooth, smoothing
from posttrain.report.format import count, percent, plain, plural
from posttrain.report.read import Run, Stage
from posttrain.report.sections.profile import profile_chart
from posttrain.report.series import Series

GROUPS = (
    ("groups_trained", "trained", "--accent"),
    ("groups_dropped_zero_advantage", "dropped: zero advantage", "--faint"),
    ("groups_dropped_stale", "dropped: stale", "--c2"),
    ("groups_dropped_unscored", "dropped: unscored", "--bad"),
    ("groups_dropped_truncated", "dropped: truncated", "--c5"),
)


def rl_section(run: Run, stage: Stage, colours: dict[str, str]) -> Section | None:
    """`colours`: the colour of each capability, the same in the whole report."""
    series = Series(stage.metrics)
    zero = stage.start
    charts = [
        profile_chart(run, stage),
        _groups(series),
        _reward(series),
        _by_capability(series, colours),
        _staleness(series, zero),
        _queue(series, zero),
        _single(series, "KL between sampler and trainer", "mismatch_kl", "nats a token", tickformat="~g"),
        _single(series, "Effective sample size", "ess", "share of the batch", range=[0, 1.05], tickformat=".0%"),
        _single(series, "Entropy of the policy", "entropy", "nats a token"),
        _single(series, "Length of a reply", "reply_tokens_mean", "tokens"),
        _single(series, "Generation", "generate_tokens_per_s", "tokens a second"),
        _times(series),
    ]
    drawn = [chart for chart in charts if chart is not None]
    stats = _stats(run, stage, series)
    blocks: list[Any] = [*([Stats(stats)] if stats else []), *([Grid(drawn)] if drawn else [])]
    return Section(stage.name, "Online RL", blocks) if blocks else None


def _stats(run: Run, stage: Stage, series: Series) -> list[Stat]:
    if not len(series):
        return []
    trained, lost = series.total("groups_trained"), [series.total(name) for name, _, _ in GROUPS[1:]]
    stats = [Stat("optimizer steps", count(len(series)), f"{plural(trained, 'group')} trained" if trained else "")]
    if tokens := series.total("tokens_trained"):
        made = series.total("tokens_generated")
        stats.append(Stat("tokens trained", count(tokens), f"of {count(made)} generated" if made else ""))
    if trained and lost[0] is not None:
        share = lost[0] / (trained + sum(amount or 0.0 for amount in lost))
        stats.append(Stat("zero-advantage groups", percent(share), "dropped and replaced"))
    if mean := series.known("staleness_mean"):
        highest = series.known("staleness_max")
        worst = f", at most {plain(max(highest))}" if highest else ""
        stats.append(Stat("staleness", plain(sum(mean) / len(mean), 2), f"versions, mean{worst}"))
    if cut := series.known("truncated_fraction"):
        stats.append(Stat("truncated replies", percent(sum(cut) / len(cut), 1), "mean of the steps"))
    parity = [event for event in run.events if event.get("event") == "parity" and event.get("stage") == stage.name]
    if parity and parity[-1].get("max_gap") is not None:
        note = f"largest log-probability gap at the start, {plural(parity[-1].get('tokens') or 0, 'token')}"
        stats.append(Stat("sampler against trainer", plain(parity[-1]["max_gap"], 2), note))
    return stats


def _reward(series: Series) -> Chart | None:
    """What the groups that were trained on scored, and what all generated replies did."""
    width = smoothing(len(series))
    data, keys = [], []
    for name, text, colour in (
        ("pass_rate", "pass rate, all replies", "--accent"),
        ("reward_mean", "mean reward, trained groups", "--c2"),
    ):
        values = series.get(name)
        if len(series.known(name)) < 2:
            continue
        if width > 1:
            data.append(dots(series.steps, values, f"{colour}@0.35", f"{text}, one step"))
        data.append(line(series.steps, smooth(values, width), colour, text))
        keys.append(Key(text, colour))
    if not data:
        return None
    caption = "On training prompts, chosen for their difficulty: not comparable with held-out accuracy."
    if width > 1:
        caption += f" Lines: mean of {width} steps."
    return Chart("Reward and pass rate", _over_steps(data), 230, "", caption, keys)


def _by_capability(series: Series, colours: dict[str, str]) -> Chart | None:
    names = series.named("reward/")
    if len(names) < 2 or len(series) < 2:
        return None
    width = 2 * smoothing(len(series)) - 1
    data, keys = [], []
    for name in names:
        colour = colours.get(name, "--muted")
        data.append(line(series.steps, smooth(series.get(f"reward/{name}"), width), colour, name, width=1.75))
        keys.append(Key(name, colour))
    caption = f"Trained groups, mean of {width} steps." if width > 1 else "Trained groups."
    return Chart("Reward by capability", _over_steps(data), 230, "", caption, keys)


def _groups(series: Series) -> Chart | None:
    shown = [entry for entry in GROUPS if sum(series.known(entry[0]))]
    if not shown:
        return None
    data = [bars(series.steps, series.get(name), colour, text, "%{y} groups") for name, text, colour in shown]
    spec = figure(data, axis("step", grid=False), axis(), barmode="stack", bargap=0.15)
    keys = [Key(text, colour, "box") for _, text, colour in shown]
    return Chart("Where the groups went", spec, 230, "groups a step", keys=keys)


def _staleness(series: Series, zero: float | None) -> Chart | None:
    x, data, keys = series.seconds(zero), [], []
    if series.has("staleness_mean"):
        data.append(line(x, series.get("staleness_mean"), "--accent", "mean of the batch"))
        keys.append(Key("mean of the batch", "--accent"))
    if series.has("staleness_max"):
        data.append(dots(x, series.get("staleness_max"), "--c2", "oldest of the batch", size=5))
        keys.append(Key("oldest of the batch", "--c2", "dot"))
    if not data:
        return None
    highest = max(series.known("staleness_max", "staleness_mean"))
    y = axis(range=[0, highest * 1.08 + 0.1], dtick=1 if highest <= 8 else None)
    return Chart("Staleness", figure(data, axis("seconds of the stage", grid=False), y), 210, "versions", keys=keys)


def _queue(series: Series, zero: float | None) -> Chart | None:
    x, data, keys = series.seconds(zero), [], []
    for name, text, colour in (
        ("queue_groups", "waiting to be trained", "--accent"),
        ("in_flight_groups", "being generated", "--c2"),
    ):
        if series.has(name):
            data.append(line(x, series.get(name), colour, text, "%{y} groups", shape="hv", width=1.75))
            keys.append(Key(text, colour))
    if not data:
        return None
    spec = figure(data, axis("seconds of the stage", grid=False), axis(rangemode="tozero"))
    return Chart("Queue", spec, 210, "groups", keys=keys)


def _times(series: Series) -> Chart | None:
    """What a step's time went to, on the trainer's side."""
    shown = [
        entry
        for entry in (("train_s", "training", "--accent"), ("wait_s", "waiting for groups", "--faint"))
        if series.has(entry[0])
    ]
    if not shown or len(series) < 2:
        return None
    data = [bars(series.steps, series.get(name), colour, text, "%{y:.2f} s") for name, text, colour in shown]
    spec = figure(data, axis("step", grid=False), axis(), barmode="stack", bargap=0.15)
    keys = [Key(text, colour, "box") for _, text, colour in shown]
    return Chart("The trainer's time", spec, 200, "seconds a step", keys=keys)


def _single(series: Series, title: str, name: str, unit: str, **settings: Any) -> Chart | None:
    if len(series.known(name)) < 2:
        return None
    data = [line(series.steps, series.get(name), "--accent", title)]
    return Chart(title, _over_steps(data, **settings), 190, unit)


def _over_steps(data: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    y: dict[str, Any] = {**axis(rangemode="tozero"), **settings}
    return figure(data, axis("step", grid=False), y)
