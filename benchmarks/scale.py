"""Writes docs/scale.md: forecasts of RL on clusters that nobody here has, and when being asynchronous pays.

    python benchmarks/scale.py docs/scale.md

Every figure of the page comes from `posttrain plan PIPELINE --cluster FILE`, that is from the simulation in
posttrain/forecast on published figures of the devices (configs/devices). It takes a few minutes on one core.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from posttrain.cli.forecast import read_stage
from posttrain.forecast.config import ClusterConfig, DeviceConfig, ReplyLengths
from posttrain.forecast.forecast import make_forecast
from posttrain.forecast.outcome import simulate
from posttrain.forecast.read import find_device, find_models, read_cluster
from posttrain.forecast.setting import Models, mean_reply_tokens, plan_asynchronous, plan_stacked
from posttrain.forecast.text import render_forecast, title_of
from posttrain.resources import bundled
from posttrain.rl.config import RlConfig

NAMES = ("scout-8", "maverick-128", "behemoth-4096")
SPREADS = (0.0, 0.5, 1.0, 1.5)
STEPS = 16

HEAD = """\
# At the scale of the Llama 4 models

Written by `python benchmarks/scale.py docs/scale.md`. None of this was run: these are forecasts of
[`posttrain plan --cluster`](plan.md#how-fast-on-a-cluster), a simulation on the real queue of the controller with
published figures of the devices (`configs/devices/`, each with its source). Replies are lognormal; their lengths, the
share of dropped groups and the seconds of a reward are assumptions that the files in `configs/scale/` state.

*In turns* means that every device holds every model: all sample one batch, then all train on it. *Padded* means in
turns without continuous batching: a batch of an engine is refilled when its longest reply has ended.
"""


def main(path: Path) -> None:
    """Write the page."""
    parts = [HEAD]
    ratios: list[tuple[float, float, str, float]] = []
    for name in NAMES:
        config, cluster, device, models = _inputs(name)
        print(f"{name}: forecast", file=sys.stderr)
        forecast = make_forecast(config, cluster, device, models=models)
        rows = []
        for spread in SPREADS:
            print(f"{name}: spread {spread}", file=sys.stderr)
            seconds = _three_ways(config, _with_spread(config, cluster, spread), device, models=models)
            rows.append((spread, *seconds))
            ratios.append((seconds[1] / seconds[0], seconds[2] / seconds[0], name, spread))
        title = title_of(f"scale/{name}/rl", cluster, device)
        parts += [_section(name, render_forecast(forecast, title=title)), _table(rows)]
    parts.append(_verdict(ratios))
    path.write_text("\n".join(parts).rstrip() + "\n")


def _inputs(name: str) -> tuple[RlConfig, ClusterConfig, DeviceConfig, Models]:
    file = bundled("configs", f"scale/{name}/rl")
    config = read_stage(str(file))
    cluster = read_cluster(bundled("configs", f"scale/{name}/cluster"))
    return config, cluster, find_device(cluster), find_models(config, cluster)


def _with_spread(config: RlConfig, cluster: ClusterConfig, spread: float) -> ClusterConfig:
    """The cluster with another spread of the replies' lengths, and the same mean before replies are cut."""
    own = cluster.workload.reply_tokens
    median = own.median * math.exp((own.sigma**2 - spread**2) / 2)
    workload = cluster.workload.model_copy(update={"reply_tokens": ReplyLengths(median=median, sigma=spread)})
    return cluster.model_copy(update={"workload": workload})


def _three_ways(
    config: RlConfig, cluster: ClusterConfig, device: DeviceConfig, *, models: Models
) -> tuple[float, float, float, float]:
    """Seconds for a thousand trained tokens: asynchronous, in turns, padded; and the mean tokens of a reply."""
    asynchronous = plan_asynchronous(config, cluster, device, models=models).setting
    turns = plan_stacked(config, cluster, device, models=models).setting
    found = [
        1000 / simulate(setting, steps=STEPS).tokens_per_s["trainer"]
        for setting in (asynchronous, turns, replace(turns, padded=True))
    ]
    return found[0], found[1], found[2], mean_reply_tokens(config, cluster.workload)


def _section(name: str, text: str) -> str:
    command = f"posttrain plan scale/{name}/rl --cluster scale/{name}/cluster"
    return f"\n## {name}\n\n```\n$ {command}\n{text}\n```\n"


def _table(rows: Sequence[tuple[float, ...]]) -> str:
    lines = [
        "The same mean length with another spread, in milliseconds for each token that is trained on:",
        "",
        "| sigma of the logarithm | mean tokens of a reply | asynchronous | in turns | padded | in turns / async. "
        "| padded / async. |",
        "|---|---|---|---|---|---|---|",
    ]
    for spread, asynchronous, turns, padded, mean in rows:
        lines.append(
            f"| {spread:g} | {mean:,.0f} | {asynchronous:.3f} | {turns:.3f} | {padded:.3f} "
            f"| {turns / asynchronous:.2f} | {padded / asynchronous:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(ratios: Sequence[tuple[float, float, str, float]]) -> str:
    turns, padded = max(ratios), max(ratios, key=lambda item: item[1])
    least = min(ratios)
    tenfold = [item for item in ratios if item[0] >= 10]
    tenfold_padded = [item for item in ratios if item[1] >= 10]
    lines = [
        "## Where ten times would hold",
        "",
        f"Against turns with continuous batching the largest ratio above is {turns[0]:.1f} ({turns[2]}, sigma "
        f"{turns[3]:g}), the smallest {least[0]:.2f} ({least[2]}, sigma {least[3]:g}). "
        + (
            f"{len(tenfold)} of {len(ratios)} cases reach 10."
            if tenfold
            else "No case reaches 10, so being asynchronous alone does not explain a factor of ten."
        ),
        "",
        f"Against padded batches the largest is {padded[1]:.1f} ({padded[2]}, sigma {padded[3]:g}); "
        + (
            "10 is reached by "
            + ", ".join(f"{name} at sigma {spread:g}" for _, _, name, spread in tenfold_padded)
            + "."
            if tenfold_padded
            else "no case reaches 10."
        ),
        "",
        "What the ratio is made of: the tail of a batch, in which few sequences keep all devices waiting (it grows "
        "with the spread, and with the number of devices that share a batch); padding, where batches are not refilled; "
        "the memory that a trainer's state takes from the KV cache; the seconds of moving it. Where engines are the "
        "bottleneck and a batch keeps them full, as on a single host, turns use the trainer's devices for sampling "
        "too, and a fixed division of few devices can be slower than turns.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
