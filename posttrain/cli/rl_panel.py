"""The panel of a running RL stage: the figures of its last optimizer step, one line for each subject."""

from collections.abc import Mapping
from typing import Any

# Subject -> its figures: the key in metrics.jsonl, a label and a format. A key that ends in / stands for all keys that
# begin with it, such as idle/trainer; the rest of the key is then the label.
SUBJECTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "reward": (
        ("reward_mean", "mean", "{:.3f}"),
        ("pass_rate", "pass rate", "{:.0%}"),
        ("reward/", "", "{:.3f}"),
    ),
    "policy": (
        ("entropy", "entropy", "{:.3g}"),
        ("grad_norm", "gradient", "{:.3g}"),
        ("mismatch_kl", "mismatch KL", "{:.2g}"),
        ("ess", "effective samples", "{:.1%}"),
        ("masked_fraction", "masked", "{:.2%}"),
        ("clipped_fraction", "clipped", "{:.2%}"),
    ),
    "staleness": (
        ("staleness_mean", "mean", "{:.2f}"),
        ("staleness_max", "at most", "{:g}"),
        ("staleness/", "groups of age ", "{:g}"),
    ),
    "groups": (
        ("groups_trained", "trained", "{:g}"),
        ("groups_too_easy", "dropped too easy", "{:g}"),
        ("groups_too_hard", "dropped too hard", "{:g}"),
        ("groups_dropped_", "dropped ", "{:g}"),
        ("unscored_fraction", "unscored replies", "{:.1%}"),
        ("evaluated_unscored", "of evaluations", "{:g}"),
        ("prompts_set_aside", "prompts set aside", "{:g}"),
    ),
    "queue": (
        ("queue_groups", "waiting", "{:g}"),
        ("in_flight_groups", "in flight", "{:g}"),
        ("queue_age_s_mean", "waited, s", "{:.1f}"),
    ),
    "episodes": (
        ("episodes", "ended", "{:g}"),
        ("episode/turns", "turns", "{:.1f}"),
        ("episode/tokens", "tokens", "{:,.0f}"),
        ("episode/tool_calls", "tool calls", "{:.1f}"),
        ("episode/malformed_calls", "malformed", "{:.2f}"),
        ("episode/tool_failures", "tools failed", "{:.2f}"),
        ("episode/cached", "cached", "{:.0%}"),
    ),
    "evaluation": (
        ("evaluation/version", "of version", "{:g}"),
        ("evaluation/accuracy", "accuracy", "{:.1%}"),
        ("evaluation/turns", "turns", "{:.1f}"),
        ("evaluation/tool_calls", "tool calls", "{:.1f}"),
        ("evaluation/malformed_calls", "malformed", "{:.2f}"),
        ("evaluation/tool_failures", "tools failed", "{:.2f}"),
    ),
    "speed": (
        ("generate_tokens_per_s", "tokens/s", "{:,.0f}"),
        ("engines", "engines", "{:g}"),
        ("idle/", "idle ", "{:.0%}"),
    ),
    "prompts": (
        ("prompts_seen", "drawn", "{:g}"),
        ("prompts_mixed", "mixed", "{:.0f}"),
    ),
}
PREFIXES = ("/", "_")
# Counters of groups with equal rewards, which may be counted by cause too: too easy, too hard.
EQUAL_REWARDS = ("groups_dropped_zero_advantage", "groups_dropped_stopped")


def alarms(name: str, value: float, unscored_limit: float | None) -> bool:
    """Whether a figure is shown as an alarm. unscored_limit: the stage's reward.alarm_fraction, None if not known."""
    if name == "unscored_fraction":
        return unscored_limit is not None and value > unscored_limit
    return name == "grad_norm" and value < 0  # the step was skipped


def figures(
    metrics: Mapping[str, float], unscored_limit: float | None = None
) -> dict[str, list[tuple[str, str, bool]]]:
    """{subject: [(label, value as text, whether it is an alarm) of each figure]}, without subjects that have none."""
    found: dict[str, list[tuple[str, str, bool]]] = {}
    for subject, entries in SUBJECTS.items():
        for key, label, form in entries:
            for name, words in _named(metrics, key, label):
                value = metrics[name]
                found.setdefault(subject, []).append((words, form.format(value), alarms(name, value, unscored_limit)))
    return found


def _named(metrics: Mapping[str, float], key: str, label: str) -> list[tuple[str, str]]:
    """(key, label) of each metric that an entry of SUBJECTS stands for. Drop counters of 0 are left out.

    So that each dropped group is counted once, counters that count the same groups again are left out too: those with a
    slash, such as `groups_dropped_length/32`, and those of groups with equal rewards if there are counters of groups
    that were too easy and too hard.
    """
    if not key.endswith(PREFIXES):
        return [(key, label)] if key in metrics else []
    names = [name for name in metrics if name.startswith(key)]
    if not key.endswith("/"):
        again = EQUAL_REWARDS if "groups_too_easy" in metrics else ()
        names = [name for name in names if metrics[name] and "/" not in name and name not in again]
    return [(name, f"{label}{name.removeprefix(key).replace('_', ' ')}") for name in names]


def rl_panel(title: str, metrics: Mapping[str, float], otherwise: str, *, unscored_limit: float | None = None) -> Any:
    """The panel as a rich object. otherwise: its text before the first step is done."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for subject, entries in figures(metrics, unscored_limit).items():
        parts: list[Any] = []
        for label, value, is_alarm in entries:
            style = "bold red" if is_alarm else "bold"
            parts += [("   " if parts else "", ""), (f"{label} ", "red" if is_alarm else "dim"), (value, style)]
        table.add_row(subject, Text.assemble(*parts))
    body = table if metrics else Text(otherwise, "dim")
    return Panel(body, title=title, title_align="left", border_style="cyan", expand=False)
