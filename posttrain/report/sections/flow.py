"""The charts of asynchronous RL: groups, their staleness, the queue, idle actors, and sampler against trainer."""

from typing import Any

from posttrain.report.blocks import Chart, Key
from posttrain.report.charts import CATEGORICAL, axis, bars, dots, figure, line
from posttrain.report.series import Series

DROPPED = "groups_dropped_"
# (column, words, colour). Groups of equal rewards are shown by cause (all replies right, or all wrong) if it is known.
FATES = (
    ("groups_trained", "trained", "--accent"),
    ("groups_too_easy", "dropped: too easy", "--c3"),
    ("groups_too_hard", "dropped: too hard", "--faint"),
    ("groups_dropped_zero_advantage", "dropped: zero advantage", "--faint"),
    ("groups_dropped_stopped", "dropped: stopped early", "--c7"),
    ("groups_dropped_unscored", "dropped: unscored", "--bad"),
    ("groups_dropped_truncated", "dropped: truncated", "--c5"),
    ("groups_dropped_stale", "dropped: stale", "--c2"),
    ("groups_dropped_surplus", "dropped: surplus", "--c4"),
)
EQUAL_REWARDS = ("groups_dropped_zero_advantage", "groups_dropped_stopped")
OTHER_COLOURS = ("--c8", "--muted", "--c7")


def fates(series: Series) -> list[tuple[str, str, str]]:
    """(column, words, colour) for each end of a group: the entries of FATES with any groups, then other reasons."""
    known = {name for name, _, _ in FATES}
    split = series.has("groups_too_easy") and series.has("groups_too_hard")
    left_out = EQUAL_REWARDS if split else ("groups_too_easy", "groups_too_hard")
    found = [entry for entry in FATES if entry[0] not in left_out and sum(series.known(entry[0]))]
    others = [reason for reason in drop_reasons(series) if DROPPED + reason not in known]
    for i, reason in enumerate(reason for reason in others if sum(series.known(DROPPED + reason))):
        words = f"dropped: {reason.replace('_', ' ')}"
        found.append((DROPPED + reason, words, OTHER_COLOURS[i % len(OTHER_COLOURS)]))
    return found


def drop_reasons(series: Series) -> list[str]:
    """The reasons for which groups were dropped.

    Columns such as `groups_dropped_length/32` are left out: they count the same groups again, by length.
    """
    return [reason for reason in series.named(DROPPED) if "/" not in reason]


def dropped_total(series: Series) -> float:
    """Number of dropped groups over all steps and reasons."""
    return sum(series.total(DROPPED + reason) or 0.0 for reason in drop_reasons(series))


def groups_chart(series: Series) -> Chart | None:
    """What became of the groups of each step."""
    return _stacked(
        series, "What became of the groups", fates(series), unit="groups a step", hover="%{y} groups", height=230
    )


def staleness_chart(series: Series, zero: float | None) -> Chart | None:
    """Mean and largest staleness of the groups trained on, over time."""
    x, data, keys = series.seconds(zero), [], []
    if series.has("staleness_mean"):
        data.append(line(x, series.get("staleness_mean"), "--accent", name="mean of the batch"))
        keys.append(Key("mean of the batch", "--accent"))
    if series.has("staleness_max"):
        data.append(dots(x, series.get("staleness_max"), "--c2", name="oldest of the batch", size=5))
        keys.append(Key("oldest of the batch", "--c2", "dot"))
    if not data:
        return None
    highest = max(series.known("staleness_max", "staleness_mean"))
    y = axis(range=[0, highest * 1.08 + 0.1], dtick=1 if highest <= 8 else None)
    return Chart("Staleness", figure(data, axis("seconds of the stage", grid=False), y), 210, "versions", keys=keys)


def ages_chart(series: Series) -> Chart | None:
    """For each step, how many groups had each staleness. The freshest are at the bottom, in the strongest colour."""
    ages = sorted((age for age in series.named("staleness/") if age.isdigit()), key=int)
    if not ages:
        return None
    shades = [1 - 0.85 * i / max(1, len(ages) - 1) for i in range(len(ages))]
    entries = [
        (f"staleness/{age}", f"{age} version{'s' * (age != '1')} old", f"--accent@{shade:.2f}")
        for age, shade in zip(ages, shades, strict=True)
    ]
    return _stacked(
        series, "Age of the groups trained on", entries, unit="groups a step", hover="%{y} groups", height=210
    )


def queue_chart(series: Series, zero: float | None) -> Chart | None:
    """How many groups were in each part of the queue, over time."""
    x, data, keys = series.seconds(zero), [], []
    for name, text, colour in (
        ("queue_groups", "waiting to be trained", "--accent"),
        ("in_flight_groups", "being generated", "--c2"),
        ("places_lent", "places lent to another capability", "--c4"),
    ):
        if series.has(name) and (name != "places_lent" or any(series.known(name))):
            data.append(line(x, series.get(name), colour, name=text, hover="%{y} groups", shape="hv", width=1.75))
            keys.append(Key(text, colour))
    if not data:
        return None
    spec = figure(data, axis("seconds of the stage", grid=False), axis(rangemode="tozero"))
    return Chart("Queue", spec, 210, "groups", keys=keys)


def lines_chart(
    series: Series,
    title: str,
    unit: str,
    *,
    entries: list[tuple[str, str, str]],
    hover: str = "%{y:.3g}",
    **settings: Any,
) -> Chart | None:
    """Several columns over the steps; None if fewer than two steps have a value.

    entries: (column, words, colour). settings: of the y axis.
    """
    drawn = [entry for entry in entries if len(series.known(entry[0])) >= 2]
    if not drawn:
        return None
    data = [
        line(series.steps, series.get(name), colour, name=text, hover=hover, width=1.75) for name, text, colour in drawn
    ]
    keys = [Key(text, colour) for _, text, colour in drawn] if len(entries) > 1 else []
    y: dict[str, Any] = {**axis(rangemode="tozero"), **settings}
    return Chart(title, figure(data, axis("step", grid=False), y), 190, unit, keys=keys)


def queue_age_chart(series: Series) -> Chart | None:
    """How long scored groups waited for the trainer, in seconds."""
    entries = [("queue_age_s_mean", "mean of the batch", "--accent"), ("queue_age_s_max", "longest", "--c2")]
    return lines_chart(series, "Wait in the queue", "seconds", entries=entries, hover="%{y:.2f} s")


def idle_chart(series: Series) -> Chart | None:
    """The share of each step in which an actor had nothing to do."""
    actors = series.named("idle/")
    entries = [(f"idle/{name}", name, CATEGORICAL[i % len(CATEGORICAL)]) for i, name in enumerate(actors)]
    return lines_chart(
        series,
        "Idle",
        "share of the step",
        entries=entries,
        hover="%{y:.0%}",
        range=[0, 1.05],
        tickformat=".0%",
        dtick=0.25,
    )


def engines_chart(series: Series) -> Chart | None:
    """How many engines sampled, where their number follows the need."""
    return lines_chart(series, "Engines", "engines", entries=[("engines", "engines", "--accent")], hover="%{y}")


def held_back_chart(series: Series) -> Chart | None:
    """The share of tokens whose gradient the loss masked or clipped."""
    entries = [("masked_fraction", "masked", "--accent"), ("clipped_fraction", "clipped", "--c2")]
    shown = [entry for entry in entries if series.has(entry[0])]
    title = " and ".join(text for _, text, _ in shown).capitalize() + " tokens"
    return lines_chart(series, title, "share of the batch", entries=shown, hover="%{y:.2%}", tickformat="~%")


def lengths_chart(series: Series) -> Chart | None:
    """Reply lengths of trained and of dropped groups.

    They show whether short or long replies are dropped more often.
    """
    entries = [
        ("reply_tokens_mean", "trained on", "--accent"),
        ("dropped_reply_tokens_mean", "dropped", "--c2"),
    ]
    shown = [entry for entry in entries if any(series.known(entry[0]))]
    return lines_chart(series, "Length of a reply", "tokens", entries=shown, hover="%{y:.0f} tokens")


# What is counted in an episode, the words for it and its colour.
EPISODE_ENTRIES = (
    ("turns", "turns of the policy", "--accent"),
    ("tool_calls", "calls of tools", "--c2"),
    ("malformed_calls", "malformed calls", "--c5"),
    ("tool_failures", "tools that failed", "--bad"),
)


def episodes_chart(series: Series) -> Chart | None:
    """What happened in an episode of several turns, as means over those that ended in a step."""
    entries = [(f"episode/{name}", words, colour) for name, words, colour in EPISODE_ENTRIES]
    shown = [entry for entry in entries if any(series.known(entry[0]))]
    return lines_chart(series, "In an episode", "mean of the episodes", entries=shown, hover="%{y:.2f}")


def unscored_chart(series: Series, alarm: float | None) -> Chart | None:
    """The share of rollouts without a reward; None if all were scored.

    alarm: the share above which the run alarms, or None if it is not known.
    """
    name = "unscored_fraction"
    values = series.get(name)
    if not any(series.known(name)):
        return None
    chart = lines_chart(
        series, "Unscored replies", "share of a step's", entries=[(name, "unscored", "--accent")], hover="%{y:.1%}"
    )
    if chart is None or alarm is None:
        return chart
    above = [value if value is not None and value > alarm else None for value in values]
    spec = dict(chart.spec)
    spec["data"] = [
        *spec["data"],
        dots(series.steps, above, "--bad", name=f"above {alarm:.0%}", hover="%{y:.1%}", size=6),
    ]
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": alarm, "y1": alarm}
    limit["line"] = {"color": "--bad", "width": 1, "dash": "dot"}
    y = {**spec["layout"]["yaxis"], "tickformat": ".0%"}
    spec["layout"] = {**spec["layout"], "shapes": [limit], "yaxis": y}
    return Chart(chart.title, spec, chart.height, chart.unit, f"Dotted line: {alarm:.0%}; the run alarms above it.")


def times_chart(series: Series) -> Chart | None:
    """What the trainer spent the time of each step on, in seconds."""
    entries = [
        ("train_s", "training", "--accent"),
        ("publish_s", "publishing weights", "--c4"),
        ("wait_s", "waiting for groups", "--faint"),
    ]
    shown = [entry for entry in entries if series.has(entry[0])]
    if len(series) < 2:
        return None
    return _stacked(series, "The trainer's time", shown, unit="seconds a step", hover="%{y:.2f} s", height=200)


def _stacked(
    series: Series, title: str, entries: list[tuple[str, str, str]], *, unit: str, hover: str, height: int
) -> Chart | None:
    if not entries:
        return None
    data = [bars(series.steps, series.get(name), colour, name=text, hover=hover) for name, text, colour in entries]
    spec = figure(data, axis("step", grid=False), axis(), barmode="stack", bargap=0.15)
    keys = [Key(text, colour, "box") for _, text, colour in entries]
    return Chart(title, spec, height, unit, keys=keys)
