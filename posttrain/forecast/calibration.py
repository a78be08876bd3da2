"""The costs of a run that was made, from its events, metrics and rollouts.

Engines: seconds of their steps by sequences and by tokens of prompts, a fit by least squares on the sums that engines
keep (sampling/step_sums.py). Trainer: CPU seconds of a step against its tokens, the prompts of its groups included.
Cores: how many times as long as its CPU seconds a step took, with so many processes at work. Replies: groups of the run
(replies.py).

In the end the run itself is simulated with these costs. What it took longer, or less, is unexplained: other work on the
machine, or the controller's. It is spread over all costs alike.
"""

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from posttrain.config.base import load_config
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.forecast.config import WorkloadConfig
from posttrain.forecast.costs import Costs, EngineCosts, TrainerCosts, UpdateCosts, scaled
from posttrain.forecast.outcome import simulate
from posttrain.forecast.replies import SampledGroups, read_groups
from posttrain.forecast.setting import Planned, make_setting
from posttrain.forecast.simulation import Setting
from posttrain.rl.config import RlConfig
from posttrain.sampling.step_sums import TERMS, as_equations

FEWEST_STEPS = 6
SEEDS = 4
OVERLOADED = 1.05  # wall seconds for each CPU second, from which on cores are taken to be shared


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run has shown. config: of its RL stage. is_overloaded: whether its processes got fewer cores than they
    could have used.
    """

    config: RlConfig
    costs: Costs
    is_overloaded: bool
    groups: SampledGroups

    def apply(self, planned: Planned, config: RlConfig) -> Planned:
        """A plan with the costs of the run. config: the one that is planned; its trainer may have more ranks."""
        return replace(planned, setting=self.setting(planned.setting, config))

    def setting(self, setting: Setting, config: RlConfig) -> Setting:
        """A setting with the costs and the replies of the run. config: the one that is planned."""
        ranks = self.config.parallel.processes / config.parallel.processes
        trainer = replace(self.costs.trainer, token_s=self.costs.trainer.token_s * ranks)
        update = replace(self.costs.update, recomputes=config.weights.kv == "recompute")
        return replace(
            setting,
            costs=replace(self.costs, trainer=trainer, update=update, judge=setting.costs.judge),
            draw=self.groups.draw(config),
            first_replies=config.first_replies,
            shares=self.groups.shares,
            max_seqs=config.engine.max_num_seqs,
            prompt_tokens=round(self.groups.prompt_tokens),
        )


def calibrate(run_dir: Path, stage: str = "rl", *, config: RlConfig | None = None) -> Calibration:
    """Fit the costs on a run. run_dir: of a run, or of the RL stage. Raises ConfigError if it has too little to fit.

    config: of the stage, if it is at hand.
    """
    folder = run_dir if (run_dir / "metrics.jsonl").exists() else run_dir / stage
    if not (folder / "metrics.jsonl").exists():
        raise ConfigError("--calibrate", [f"{run_dir}: has no RL stage with metrics; give the folder of a run"])
    if config is None:
        config = load_config(RlConfig, folder / "config.yaml")
    steps = list(read_jsonl(folder / "metrics.jsonl"))[1:]  # the first waits for what starts
    if len(steps) < FEWEST_STEPS or any("train_cpu_s" not in step for step in steps):
        raise ConfigError(
            "--calibrate", [f"{folder}: needs {FEWEST_STEPS + 1} steps with `train_cpu_s` in their metrics"]
        )
    events = [event for event in read_jsonl(folder.parent / "events.jsonl") if event.get("stage") == folder.name]
    # Of engines that join and leave: the mean.
    engines = fmean([step.get("engines", config.resources.rollout.most) for step in steps])
    slowdown = median(step["train_s"] / max(step["train_cpu_s"], 1e-6) for step in steps)
    cores = None
    if not config.resources.rollout.gpus:
        most = float(os.cpu_count() or 1)
        cores = min(most, (engines + 1) / slowdown) if slowdown > OVERLOADED else most
    groups = read_groups(folder, config)
    scored = sum(end - start for start, end in _busy(events, "score"))
    costs = Costs(
        fit_steps(event["sums"] for event in events if event.get("event") == "engine_steps"),
        _trainer(steps, groups.prompt_tokens),
        UpdateCosts(0.0, fmean([end - start for start, end in _busy(events, "update_weights")] or [0.0])),
        reward_s=scored / max(1, groups.num_scorings()),
        cores=cores,
    )
    found = Calibration(config, costs, slowdown > OVERLOADED, groups)
    return replace(found, costs=scaled(costs, _unexplained(found, steps, max(1, round(engines)))))


def _unexplained(found: Calibration, steps: Sequence[dict[str, Any]], engines: int) -> float:
    """How many times as long the steps of the run took as they do in a simulation of it."""
    setting = found.setting(make_setting(found.config, WorkloadConfig(), found.costs, engines=engines), found.config)
    simulated = fmean(simulate(setting, steps=len(steps) + 1, seed=seed).step_s for seed in range(SEEDS))
    return fmean(step["step_wall_s"] for step in steps[len(steps) // 3 :]) / simulated


def _busy(events: Sequence[dict[str, Any]], what: str) -> list[tuple[float, float]]:
    return [(e["start"], e["end"]) for e in events if e.get("event") == "busy" and e.get("what") == what]


def _trainer(steps: Sequence[dict[str, Any]], prompt_tokens: float) -> TrainerCosts:
    """A line through (tokens, CPU seconds) whose slope is the median of those of all pairs: no outlier turns it."""
    points = [
        (
            step["tokens_trained"] + step["groups_trained"] * prompt_tokens,
            step["train_cpu_s"] + step.get("publish_s", 0.0),
        )
        for step in steps
    ]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] != a[0]]
    most = median(seconds / tokens for tokens, seconds in points)
    token_s = min(max(0.0, median(slopes)) if slopes else most, most)
    return TrainerCosts(max(0.0, median(seconds - token_s * tokens for tokens, seconds in points)), token_s)


def fit_steps(sums: Iterable[Sequence[float]]) -> EngineCosts:
    """The costs by which the seconds of steps, of which these are the sums (`StepSums`), are explained best.

    No cost is below 0: of the terms, those count with which the fit is best. Raises ConfigError if there are no steps.
    """
    stretches = list(sums)
    if not any(map(any, stretches)):
        raise ConfigError("--calibrate", ["the run has no events engine_steps: its engines took no new weights"])
    products, seconds = as_equations(np.sum(stretches, axis=0).tolist())
    best, least = np.zeros(TERMS), 0.0
    every = itertools.chain.from_iterable(itertools.combinations(range(TERMS), n + 1) for n in range(TERMS))
    for which in map(list, every):
        found, *_ = np.linalg.lstsq(products[np.ix_(which, which)], seconds[which])
        error = -float(found @ seconds[which])  # less the sum of the squared seconds, which is the same for all
        if (found >= 0).all() and error < least:
            best, least = np.zeros(TERMS), error
            best[which] = found
    step_s, token_s, prefill_s = (float(value) for value in best)
    return EngineCosts(step_s, token_s, prefill_s)


def describe(calibration: Calibration) -> str:
    """The fitted costs in a line of JSON."""
    costs = calibration.costs
    return json.dumps(
        {
            "engine_step_s": costs.engine.step_s,
            "engine_token_s": costs.engine.token_s,
            "engine_prefill_s": costs.engine.prefill_s,
            "trainer_fixed_s": costs.trainer.fixed_s,
            "trainer_token_s": costs.trainer.token_s,
            "update_pause_s": costs.update.pause_s,
            "reward_s": costs.reward_s,
            "cores": costs.cores,
        }
    )
