"""What the evaluations beside an RL training found: at which policy version, not at which step they ended."""

from posttrain.report.blocks import Chart
from posttrain.report.sections.flow import EPISODE_ENTRIES, lines_chart
from posttrain.report.series import Series

_BEGINS = "evaluation/"


def _by_version(series: Series) -> Series:
    """The columns of the evaluations over the versions that they measured."""
    found = [line for line in series.lines if f"{_BEGINS}version" in line]
    return Series([{**line, "step": line[f"{_BEGINS}version"]} for line in found])


def accuracy_chart(series: Series, colours: dict[str, str]) -> Chart | None:
    """The accuracy on held-out prompts; None if there were fewer than two evaluations."""
    names = series.named(f"{_BEGINS}accuracy/")
    entries = [(f"{_BEGINS}accuracy", "all held-out prompts", "--accent")]
    entries += [(f"{_BEGINS}accuracy/{name}", name, colours.get(name, "--muted")) for name in names]
    return lines_chart(
        _by_version(series), "Accuracy of evaluations", "of the replies to a prompt, mean", entries=entries,
        hover="%{y:.1%}", range=[0, 1.05], tickformat=".0%",
    )  # fmt: skip


def evaluated_episodes_chart(series: Series) -> Chart | None:
    """What happened in the episodes of the evaluations."""
    entries = [(f"{_BEGINS}{name}", words, colour) for name, words, colour in EPISODE_ENTRIES]
    shown = [entry for entry in entries if any(series.known(entry[0]))]
    title = "In an episode of evaluations"
    return lines_chart(_by_version(series), title, "mean of the episodes", entries=shown, hover="%{y:.2f}")
