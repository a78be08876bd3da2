"""Online RL: how training changed the policy over the steps. flow.py draws the queue, the actors and the timing."""

from typing import Any

from posttrain.metrics.unscored import kinds_text
from posttrain.report.blocks import Chart, Grid, Key, Section, Stat, Stats
from posttrain.report.charts import axis, dots, figure, line, smooth, smoothing
from posttrain.report.format import count, percent, plain, plural
from posttrain.report.read import Run, Stage, mapping, number
from posttrain.report.sections.beside import accuracy_chart, evaluated_episodes_chart
from posttrain.report.sections.flow import (
    EQUAL_REWARDS,
    ages_chart,
    dropped_total,
    engines_chart,
    episodes_chart,
    groups_chart,
    held_back_chart,
    idle_chart,
    lengths_chart,
    lines_chart,
    queue_age_chart,
    queue_chart,
    staleness_chart,
    times_chart,
    unscored_chart,
)
from posttrain.report.sections.profile import profile_chart
from posttrain.report.series import Series


def rl_section(run: Run, stage: Stage, colours: dict[str, str]) -> Section | None:
    """The section of an RL stage. colours: one for each capability, the same in the whole report."""
    series = Series(stage.metrics)
    zero = stage.start
    charts = [
        profile_chart(run, stage),
        groups_chart(series),
        _reward(series),
        _by_capability(series, colours),
        accuracy_chart(series, colours),
        evaluated_episodes_chart(series),
        _prompts(series),
        staleness_chart(series, zero),
        ages_chart(series),
        queue_chart(series, zero),
        queue_age_chart(series),
        _single(series, "KL between sampler and trainer", "mismatch_kl", unit="nats a token", tickformat="~g"),
        _single(series, "Effective sample size", "ess", unit="share of the batch", range=[0, 1.05], tickformat=".0%"),
        held_back_chart(series),
        _single(series, "Entropy of the policy", "entropy", unit="nats a token"),
        _gradient(series),
        _single(series, "Entropy of the routers", "router_entropy", unit="nats, mean of the layers"),
        _single(series, "Busiest expert", "expert_load_max", unit="times an even load"),
        _single(series, "Dead experts", "dead_experts", unit="of all layers")
        if any(series.known("dead_experts"))
        else None,
        lengths_chart(series),
        episodes_chart(series),
        _single(series, "Length of an episode", "episode/tokens", unit="tokens, with the prompt, mean"),
        _single(series, "Tokens of later turns that were cached", "episode/cached", unit="share", tickformat=".0%"),
        _single(series, "Truncated replies", "truncated_fraction", unit="share of a step's", tickformat="~%"),
        unscored_chart(series, stage.setting("reward.alarm_fraction")),
        _single(series, "Generation", "generate_tokens_per_s", unit="tokens a second"),
        idle_chart(series),
        engines_chart(series),
        times_chart(series),
    ]
    drawn = [chart for chart in charts if chart is not None]
    stats = _stats(run, stage, series)
    blocks: list[Any] = [*([Stats(stats)] if stats else []), *([Grid(drawn)] if drawn else [])]
    return Section(stage.name, "Online RL", blocks) if blocks else None


def _stats(run: Run, stage: Stage, series: Series) -> list[Stat]:
    if not len(series):
        return []
    trained = series.total("groups_trained")
    lost = [total for name in EQUAL_REWARDS if (total := series.total(name)) is not None]
    stats = [Stat("optimizer steps", count(len(series)), f"{plural(trained, 'group')} trained" if trained else "")]
    if tokens := series.total("tokens_trained"):
        made = series.total("tokens_generated")
        stats.append(Stat("tokens trained", count(tokens), f"of {count(made)} generated" if made else ""))
    if trained and lost:
        share = sum(lost) / (trained + dropped_total(series))
        stats.append(Stat("zero-advantage groups", percent(share), "dropped and replaced"))
    if unscored := series.known("unscored_fraction"):
        note = f"mean of the steps, at most {percent(max(unscored), 1)}"
        stats.append(
            Stat("unscored replies", percent(sum(unscored) / len(unscored), 1), note, _alarms(stage, unscored))
        )
    stats += _other_unscored(stage, series)
    if skipped := series.total("skipped"):
        stats.append(Stat("skipped steps", count(skipped), "loss or gradient was not finite", alarm=True))
    if mean := series.known("staleness_mean"):
        highest = series.known("staleness_max")
        worst = f", at most {plain(max(highest))}" if highest else ""
        stats.append(Stat("staleness", plain(sum(mean) / len(mean), 2), f"versions, mean{worst}"))
    if cut := series.known("truncated_fraction"):
        stats.append(Stat("truncated replies", percent(sum(cut) / len(cut), 1), "mean of the steps"))
    if episodes := series.total("episodes"):
        turns = sum((line.get("episode/turns") or 0) * (line.get("episodes") or 0) for line in series.lines)
        stats.append(Stat("episodes", count(episodes), f"{plain(turns / episodes, 2)} turns each"))
    parity = [event for event in run.events if event.get("event") == "parity" and event.get("stage") == stage.name]
    if parity and parity[-1].get("max_gap") is not None:
        note = f"largest log-probability gap at the start, {plural(parity[-1].get('tokens') or 0, 'token')}"
        stats.append(Stat("sampler against trainer", plain(parity[-1]["max_gap"], 2), note))
    return stats


def _other_unscored(stage: Stage, series: Series) -> list[Stat]:
    """Unscored replies outside of training: in the profile and in evaluations during the stage."""
    limit, stats = stage.setting("reward.alarm_fraction"), []
    profile = mapping(stage.figures.get("profile"))
    if lost := number(profile.get("prompts_unscored")) or series.last("prompts_set_aside"):
        of, unscored = number(profile.get("replies")), number(profile.get("replies_unscored"))
        is_alarm = limit is not None and bool(of) and unscored is not None and unscored / of > limit
        kinds = kinds_text({str(kind): round(number(n) or 0) for kind, n in mapping(profile.get("kinds")).items()})
        stats.append(Stat("unscored prompts", count(lost), f"in the profile, set aside {kinds}".rstrip(), is_alarm))
    if lost := series.total("evaluated_unscored"):
        stats.append(Stat("unscored replies in evaluations", count(lost), "in all steps"))
    return stats


def _alarms(stage: Stage, unscored: list[float]) -> bool:
    limit = stage.setting("reward.alarm_fraction")
    return limit is not None and max(unscored) > limit


def _reward(series: Series) -> Chart | None:
    """The reward of the groups that were trained on, and of all replies that were generated."""
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
            data.append(dots(series.steps, values, f"{colour}@0.35", name=f"{text}, one step"))
        data.append(line(series.steps, smooth(values, width), colour, name=text))
        keys.append(Key(text, colour))
    if not data:
        return None
    caption = "On training prompts, which are chosen for their difficulty. Not comparable with held-out accuracy."
    if width > 1:
        caption += f" Lines: mean of {width} steps."
    return Chart("Reward and pass rate", _over_steps(data), 230, "", caption, keys)


def _by_capability(series: Series, colours: dict[str, str]) -> Chart | None:
    """The reward of the groups that were trained on, one line for each capability."""
    names = series.named("reward/")
    if len(names) < 2 or len(series) < 2:
        return None
    width = 2 * smoothing(len(series)) - 1
    data, keys = [], []
    for name in names:
        colour = colours.get(name, "--muted")
        data.append(line(series.steps, smooth(series.get(f"reward/{name}"), width), colour, name=name, width=1.75))
        keys.append(Key(name, colour))
    caption = f"Trained groups, mean of {width} steps." if width > 1 else "Trained groups."
    return Chart("Reward by capability", _over_steps(data), 230, "", caption, keys)


def _prompts(series: Series) -> Chart | None:
    """How many prompts have been drawn, and how many would give a mixed group, by the beliefs about them."""
    entries = [
        ("prompts_seen", "drawn so far", "--faint"),
        ("prompts_mixed", "expected to give a mixed group", "--c3"),
    ]
    return lines_chart(series, "Prompts", "prompts", entries=entries, hover="%{y:.0f} prompts")


def _gradient(series: Series) -> Chart | None:
    """The norm of the gradient. A step that was skipped has none."""
    norms = [value if value is not None and value >= 0 else None for value in series.get("grad_norm")]
    if sum(value is not None for value in norms) < 2:
        return None
    return Chart(
        "Gradient", _over_steps([line(series.steps, norms, "--accent", name="norm")]), 190, "norm, before clipping"
    )


def _single(series: Series, title: str, name: str, *, unit: str, **settings: object) -> Chart | None:
    if len(series.known(name)) < 2:
        return None
    data = [line(series.steps, series.get(name), "--accent", name=title)]
    return Chart(title, _over_steps(data, **settings), 190, unit)


def _over_steps(data: list[dict[str, Any]], **settings: object) -> dict[str, Any]:
    y: dict[str, Any] = {**axis(rangemode="tozero"), **settings}
    return figure(data, axis("step", grid=False), y)
