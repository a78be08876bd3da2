"""The costs of a run that was made, from its events, metrics and rollouts.

Engines: seconds of their steps by sequences and by tokens of prompts, a fit by least squares on the sums that engines
keep (sampling/step_sums.py). Trainer: CPU seconds of a step against its tokens, the prompts of its groups included.
Replies: groups of the run (replies.py).

In the end the run itself is simulated with these costs. Where its processes shared cores, they are taken to have had
as many as make the simulation take as long as the run: cores that are threads of one core, and the controller's work,
count as cores that were missing. What is unexplained then is spread over all costs alike.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
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
SEEDS = 3
FEWEST_CORES, HALVINGS = 0.5, 6
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
    cores = None if config.resources.rollout.gpus else float(os.cpu_count() or 1)
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
    own = make_setting(config, WorkloadConfig(), costs, engines=max(1, round(engines)))
    took_s = fmean(step["step_wall_s"] for step in steps[len(steps) // 3 :])

    def simulated_s(costs: Costs) -> float:
        setting = replace(found, costs=costs).setting(own, config)
        return fmean(simulate(setting, steps=len(steps) + 1, seed=seed).step_s for seed in range(SEEDS))

    if cores is not None and found.is_overloaded:
        costs = replace(
            costs,
            cores=_cores(
                lambda number: simulated_s(replace(costs, cores=number)),
                took_s,
                most=min(cores, engines + 1),  # more than the processes at work make no difference
            ),
        )
    return replace(found, costs=scaled(costs, took_s / simulated_s(costs)))


def _cores(simulated_s: Callable[[float], float], took_s: float, *, most: float) -> float:
    """The number of cores with which steps are simulated to take so long, from FEWEST_CORES to `most`."""
    least = FEWEST_CORES
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if simulated_s(middle) > took_s else (least, middle)
    return (least + most) / 2


def _busy(events: Sequence[dict[str, Any]], what: str) -> list[tuple[float, float]]:
    return [(e["start"], e["end"]) for e in events if e.get("event") == "busy" and e.get("what") == what]


def _trainer(steps: Sequence[dict[str, Any]], prompt_tokens: float) -> TrainerCosts:
    """A line through (tokens, CPU seconds) whose slope is a quantile of those of all pairs, so no outlier turns it.

    It is the upper quartile, and at most the slope without a fixed part: where steps are too much alike to tell, the
    time is taken to be that of the tokens.
    """
    points = [
        (
            step["tokens_trained"] + step["groups_trained"] * prompt_tokens,
            step["train_cpu_s"] + step.get("publish_s", 0.0),
        )
        for step in steps
    ]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] != a[0]]
    most = median(seconds / tokens for tokens, seconds in points)
    token_s = min(max(0.0, quantiles(slopes)[-1]) if len(slopes) > 1 else most, most)
    return TrainerCosts(max(0.0, median(seconds - token_s * tokens for tokens, seconds in points)), token_s)


def fit_steps(sums: Iterable[Sequence[float]]) -> EngineCosts:
    """The costs by which the seconds of steps, of which these are the sums (`StepSums`), are explained best.

    No cost is below 0: of the terms, those count with which the fit is best. Raises ConfigError if there are no steps.
    """
    stretches = list(sums)
    if not any(map(any, stretches)):
        raise ConfigError(
            "--calibrate",
            ["the run has no events engine_steps: its engines took no new weights, or it is of an older version"],
        )
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
