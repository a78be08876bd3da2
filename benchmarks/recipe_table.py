"""The page of the docs and the picture that recipe.py makes of its results."""

import statistics
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from scipy.stats import t as student

ROW, LEFT, WIDE, POINT = 24, 430, 380, 9.0  # pixels: of a row, of the text, of the chart; of a point of accuracy
Runs = Mapping[str, Mapping[str, Any]]


def seeds_of(name: str, runs: Runs) -> list[str]:
    """The seeds with which an arm was run."""
    return sorted(key.partition("/")[2] for key in runs if key.partition("/")[0] == name)


def differences(name: str, against: str, runs: Runs) -> list[float]:
    """The accuracy of an arm minus that of the other, in points, for each seed that both have."""
    both = [seed for seed in seeds_of(name, runs) if f"{against}/{seed}" in runs]
    return [100 * (runs[f"{name}/{seed}"]["accuracy"] - runs[f"{against}/{seed}"]["accuracy"]) for seed in both]


def interval(values: list[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean; None for less than two values."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


PAGE = """# What each part of the recipe does

Written by `python benchmarks/recipe.py`. Each line is the [quick start](../pipelines/quickstart.yaml) with one part
changed, from the same base, judge and SFT where these are the same: a tiny model, 36 steps of RL. So these are findings
about this task and this size, not about others. Accuracy is greedy, on 400 held-out puzzles; pass@8 is of 100 of them;
both are means over the seeds. The interval is Student's, 95%, of the difference over the seeds. Tokens are what RL
sampled, without evaluations. Runs were made two at a time, beside other programs, so no times are given;
[the speed of RL](rl.md#speed) has them. `benchmarks/results/recipe.json` has every run.

{table}

Three seeds show differences of about 2 to 3 points and more; smaller ones may exist.

![points of accuracy against the control, by arm](recipe.svg)

{sentences}
"""


def page(arms: Mapping[str, Any], runs: Runs) -> str:
    """The page of the docs: the table, the picture, and a sentence for each arm."""
    said = "\n".join(f"- {sentence}" for sentence in sentences(arms, runs))
    return PAGE.format(table=table(arms, runs), sentences=said)


def table(arms: Mapping[str, Any], runs: Runs) -> str:
    """Markdown: a line for each arm; of one that was not run it says so."""
    lines = [
        "| arm | seeds | accuracy after SFT, at the end | pass@8 after SFT, at the end | points against the control "
        "| thousand tokens of RL |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        seeds = seeds_of(name, runs)
        if not seeds:
            lines.append(f"| {arm.text} | none | not run | | | |")
            continue
        found = [runs[f"{name}/{seed}"] for seed in seeds]
        pairs = [", ".join(f"{_mean(f[key][stage] for f in found):.1%}" for stage in found[0][key]) for key in KEYS]
        values = differences(name, arm.against, runs) if name != arm.against else []
        tokens = f"{_mean(f['rl_tokens'] for f in found) / 1e3:.0f}"
        lines.append(f"| {arm.text} | {', '.join(seeds)} | {pairs[0]} | {pairs[1]} | {_points(values)} | {tokens} |")
    return "\n".join(lines)


def sentences(arms: Mapping[str, Any], runs: Runs) -> list[str]:
    """For each arm that was run: its claim, and what was found. Then how often instructions were followed."""
    found = []
    for name, arm in arms.items():
        if name != arm.against and (values := differences(name, arm.against, runs)):
            found.append(
                f"{arm.claim}? {arm.text[0].upper() + arm.text[1:]}, against {arms[arm.against].text}: {_said(values)}."
            )
    for name, arm in arms.items():
        of_seeds = [runs[f"{name}/{seed}"] for seed in seeds_of(name, runs)]
        if shares := [run["followed"] for run in of_seeds if "followed" in run]:
            told = (f"{_mean(share[key] for share in shares):.1%} {text}" for key, text in ASKED.items())
            found.append(f"Of 400 replies of each seed, {arm.text}: {', '.join(told)}.")
    return found


KEYS = ("greedy", "pass@k")
ASKED = {"worked": "show work when asked", "alone": "give the answer alone when asked"}


def _mean(values: Any) -> float:
    return statistics.fmean(list(values))


def _points(values: list[float]) -> str:
    if not values:
        return ""
    if (found := interval(values)) is None:
        return f"{values[0]:+.1f}, one seed, no interval"
    return f"{statistics.fmean(values):+.1f} [{found[0]:+.1f}, {found[1]:+.1f}]"


def _said(values: list[float]) -> str:
    found = interval(values)
    if found is None:
        return f"{_points(values)}, so nothing is shown"
    verdict = "no difference was found" if found[0] <= 0 <= found[1] else "better" if found[0] > 0 else "worse"
    return f"{verdict}, {_points(values)} points over {len(values)} seeds"


def picture(arms: Mapping[str, Any], runs: Runs) -> str:
    """SVG: for each arm a dot for each seed, the mean, and its interval, in points of accuracy against the control."""
    shown = [(arm.text, differences(name, arm.against, runs)) for name, arm in arms.items() if name != arm.against]
    shown = [(text, values) for text, values in shown if values]
    height, zero = ROW * (len(shown) + 2), LEFT + WIDE / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{zero}" y="16" text-anchor="middle">points of accuracy against the control</text>',
        f'<line x1="{zero}" y1="{ROW}" x2="{zero}" y2="{height - ROW}" stroke="#888"/>',
    ]
    for points in range(-20, 21, 10):
        x = zero + POINT * points
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle" fill="#555">{points:+d}</text>')
    for index, (text, values) in enumerate(shown):
        y = ROW * (index + 1.5)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        if (found := interval(values)) is not None:
            low, high = (_x(zero, value) for value in found)
            parts.append(f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="#36c" stroke-width="2"/>')
            mean = _x(zero, statistics.fmean(values))
            parts.append(f'<line x1="{mean}" y1="{y - 6}" x2="{mean}" y2="{y + 6}" stroke="#36c" stroke-width="3"/>')
        parts += [f'<circle cx="{_x(zero, value)}" cy="{y}" r="4" fill="#36c" fill-opacity="0.5"/>' for value in values]
    return "\n".join([*parts, "</svg>", ""])


def _x(zero: float, points: float) -> float:
    return round(min(max(zero + POINT * points, LEFT), LEFT + WIDE), 1)
