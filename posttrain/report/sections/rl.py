"""Online RL: reward over the steps, where the groups went, how stale and how far from the sampler training was."""

from typing import Any

from posttrain.report.blocks import Chart, Grid, Key, Section, Stat, Stats
from posttrain.report.charts import axis, bars, dots, figure, line, smooth, smoothing
from posttrain.report.format import count, percent, plain
from posttrain.report.read import Run, Stage
from posttrain.report.sections.profile import profile_chart
from posttrain.report.series import Series

GROUPS = (
    ("groups_trained", "trained", "--accent"),
    ("groups_dropped_zero_advantage", "dropped: zero advantage", "--faint"),
    ("groups_dropped_stale", "dropped: stale", "--c2"),
    ("groups_dropped_unscored", "dropped: unscored", "--bad"),
)


def rl_section(run: Run, stage: Stage, colours: dict[str, str]) -> Section | None:
    """`colours`: the colour of each capability, the same in the whole report."""
    series = Series(stage.metrics)
    profile = profile_chart(run, stage)
    if not series and profile is None:
        return None
    zero = stage.start
    charts = [
        _reward(series),
        _by_capability(series, colours),
        profile,
        _groups(series),
        _staleness(series, zero),
        _queue(series, zero),
        _single(series, "KL between sampler and trainer", "mismatch_kl", "nats a token", tickformat=".1e"),
        _single(series, "Effective sample size", "ess", "share of the batch", range=[0, 1.04], tickformat=".0%"),
        _single(series, "Entropy of the policy", "entropy", "nats a token", rangemode="tozero"),
        _lengths(series),
        _rate(series),
        _times(series),
    ]
    drawn = [chart for chart in charts if chart is not None]
    stats = _stats(series)
    blocks: list[Any] = [*([Stats(stats)] if stats else []), *([Grid(drawn)] if drawn else [])]
    return Section(stage.name, "Online RL", blocks) if blocks else None


def _stats(series: Series) -> list[Stat]:
    stats = []
    trained, zero = series.total("groups_trained"), series.total("groups_dropped_zero_advantage")
    if len(series):
        stats.append(Stat("optimizer steps", count(len(series)), f"{count(trained)} groups trained" if trained else ""))
    tokens = series.total("tokens_trained")
    if tokens:
        made = series.total("tokens_generated")
        stats.append(Stat("tokens trained", count(tokens), f"{count(made)} generated" if made else ""))
    lost = [series.total(name) or 0.0 for name, _, _ in GROUPS[1:]]
    if trained is not None and zero is not None and trained + sum(lost) > 0:
        stats.append(Stat("zero-advantage groups", percent(zero / (trained + sum(lost)), 1), "dropped and replaced"))
    mean, highest = series.known("staleness_mean"), series.known("staleness_max")
    if mean:
        worst = f"at most {plain(max(highest))}" if highest else ""
        stats.append(Stat("staleness", plain(sum(mean) / len(mean), 2), f"versions, mean; {worst}".rstrip("; ")))
    rate = series.known("generate_tokens_per_s")
    if rate:
        stats.append(Stat("generation", count(sorted(rate)[len(rate) // 2]), "tokens a second, median step"))
    return stats


def _reward(series: Series) -> Chart | None:
    """Reward and pass rate of what was generated for each step; one line where the two are the same."""
    reward, passed = series.get("reward_mean"), series.get("pass_rate")
    if len(series.known("reward_mean")) < 2 and len(series.known("pass_rate")) < 2:
        return None
    width = smoothing(len(series))
    same = all(a is not None and b is not None and abs(a - b) < 1e-6 for a, b in zip(reward, passed, strict=True))
    shown = [(reward, "mean reward", "--accent", "solid")] if series.has("reward_mean") else []
    if series.has("pass_rate") and not same:
        shown.append((passed, "pass rate", "--c2", "solid"))
    data, keys = [], []
    for values, name, colour, dash in shown:
        name = "mean reward, equal to the pass rate" if same else name
        if width > 1:
            data.append(dots(series.steps, values, f"{colour}@0.35", "one step"))
        data.append(line(series.steps, smooth(values, width), colour, name, dash=dash))
        keys.append(Key(name, colour))
    caption = "Training prompts, chosen because they are hard: not comparable with held-out accuracy."
    if width > 1:
        caption += f" Lines: mean of {width} steps."
    return Chart("Reward", _over_steps(data, rangemode="tozero"), 230, caption, keys)


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
    caption = f"Mean of {width} steps." if width > 1 else ""
    return Chart("Reward by capability", _over_steps(data, rangemode="tozero"), 230, caption, keys)


def _groups(series: Series) -> Chart | None:
    shown = [entry for entry in GROUPS if sum(series.known(entry[0]))]
    if not shown:
        return None
    data = [bars(series.steps, series.get(name), colour, text, "%{y} groups") for name, text, colour in shown]
    spec = figure(data, axis("step", grid=False), axis("groups"), barmode="stack", bargap=0.15)
    return Chart("Where the groups went", spec, 230, keys=[Key(text, colour, "box") for _, text, colour in shown])


def _staleness(series: Series, zero: float | None) -> Chart | None:
    if not series.has("staleness_mean", "staleness_max"):
        return None
    x, data, keys = series.seconds(zero), [], []
    if series.has("staleness_max"):
        data.append(dots(x, series.get("staleness_max"), "--c2", "oldest token of the batch", size=5))
        keys.append(Key("oldest token of the batch", "--c2", "dot"))
    if series.has("staleness_mean"):
        data.append(line(x, series.get("staleness_mean"), "--accent", "mean of the batch"))
        keys.insert(0, Key("mean of the batch", "--accent"))
    spec = figure(data, axis("seconds of the stage", grid=False), axis("versions", rangemode="tozero"))
    return Chart("Staleness", spec, 210, keys=keys)


def _queue(series: Series, zero: float | None) -> Chart | None:
    x, data, keys = series.seconds(zero), [], []
    for name, text, colour in (
        ("queue_groups", "waiting to be trained", "--accent"),
        ("in_flight_groups", "being generated", "--c2"),
    ):
        if series.has(name):
            data.append(line(x, series.get(name), colour, text, "%{y} groups", shape="hv"))
            keys.append(Key(text, colour))
    if not data:
        return None
    spec = figure(data, axis("seconds of the stage", grid=False), axis("groups", rangemode="tozero"))
    return Chart("Queue", spec, 210, keys=keys)


def _lengths(series: Series) -> Chart | None:
    if len(series.known("reply_tokens_mean")) < 2:
        return None
    data = [line(series.steps, series.get("reply_tokens_mean"), "--accent", "tokens a reply")]
    cut = series.known("truncated_fraction")
    caption = (
        f"Truncated replies: {percent(cut[0], 1)} at the first step, {percent(cut[-1], 1)} at the last." if cut else ""
    )
    return Chart("Length of a reply, tokens", _over_steps(data, rangemode="tozero"), 200, caption)


def _rate(series: Series) -> Chart | None:
    return _single(series, "Generation", "generate_tokens_per_s", "tokens a second", rangemode="tozero")


def _times(series: Series) -> Chart | None:
    """What a step's time went to, on the trainer's side."""
    shown = [
        ("train_s", "training", "--accent"),
        ("wait_s", "waiting for groups", "--faint"),
    ]
    shown = [entry for entry in shown if series.has(entry[0])]
    if not shown or len(series) < 2:
        return None
    data = [bars(series.steps, series.get(name), colour, text, "%{y:.2f} s") for name, text, colour in shown]
    spec = figure(data, axis("step", grid=False), axis("seconds"), barmode="stack", bargap=0.15)
    return Chart("The trainer's time, a step", spec, 200, keys=[Key(text, colour, "box") for _, text, colour in shown])


def _single(series: Series, title: str, name: str, unit: str, **settings: Any) -> Chart | None:
    if len(series.known(name)) < 2:
        return None
    data = [line(series.steps, series.get(name), "--accent", title)]
    return Chart(title, _over_steps(data, unit, **settings), 200)


def _over_steps(data: list[dict[str, Any]], unit: str = "", **settings: Any) -> dict[str, Any]:
    return figure(data, axis("step", grid=False), axis(unit, **settings))
