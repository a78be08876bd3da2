"""The costs of a run that was made, from its events, metrics and rollouts.

Engines: while an engine has c sequences, and samples n tokens, it makes n / c steps, so that
seconds * speed = n * (step_s / c + token_s). The time in which it has nothing to sample does not count. Trainer: CPU
seconds of a step against its tokens. Cores: how many times as long as its CPU seconds a step took, with so many
processes at work. Replies: groups of the run, of the same step.

The costs of prompts and of KV caches that are computed again are in the costs of tokens, because a run does not tell
them apart.
"""

import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from posttrain.config.base import load_config
from posttrain.errors import ConfigError, DataError
from posttrain.files import read_jsonl
from posttrain.forecast.costs import Costs, EngineCosts, TrainerCosts, UpdateCosts
from posttrain.forecast.setting import Planned
from posttrain.forecast.simulation import Draw, Setting
from posttrain.rl.config import RlConfig

FEWEST_STEPS = 6
FEWEST_STRETCHES = 4
UNDECIDED = ("dropped:finished", "dropped:surplus", "dropped:stale")  # dropped for other reasons than their rewards
OVERLOADED = 1.05  # wall seconds for each CPU second, from which on cores are taken to be shared


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run has shown. config: of its RL stage. groups: (lengths, whether kept) by step and capability.

    is_overloaded: whether its processes got fewer cores than they could have used.
    """

    config: RlConfig
    costs: Costs
    is_overloaded: bool
    shares: dict[str, float]
    groups: dict[tuple[int, str], list[tuple[list[int], bool]]]

    def apply(self, planned: Planned, config: RlConfig) -> Planned:
        """A plan with the costs of the run. config: the one that is planned; its trainer may have more ranks."""
        return replace(planned, setting=self.setting(planned.setting, config))

    def setting(self, setting: Setting, config: RlConfig) -> Setting:
        """A setting with the costs and the replies of the run. config: the one that is planned."""
        ranks = self.config.parallel.processes / config.parallel.processes
        trainer = replace(self.costs.trainer, token_s=self.costs.trainer.token_s * ranks)
        return replace(
            setting,
            costs=replace(self.costs, trainer=trainer, judge=setting.costs.judge),
            draw=self.draw(config),
            first_replies=config.first_replies,
            shares=self.shares,
            max_seqs=config.engine.max_num_seqs,
        )

    def draw(self, config: RlConfig) -> Draw:
        """Draws groups that the run sampled, of the same step or the nearest one before it.

        A group that was stopped by its first replies has only these. If the run sampled every group whole, the first
        replies stop each group that is dropped.
        """
        last = max(step for step, _ in self.groups)
        groups, most, first = self.groups, config.sampling.max_tokens, config.first_replies
        # The size of the groups that went on though they were dropped in the end.
        of_dropped = self.config.group_size if self.config.first_replies is not None else None

        def draw(source: random.Random, capability: str, step: int) -> tuple[list[int], bool]:
            pool = next(
                found
                for at in (*range(min(step, last), -1, -1), *range(last + 1))
                if (found := groups.get((at, capability)))
            )
            lengths, is_kept = source.choice(pool)
            size = config.group_size
            if first is not None and not is_kept and len(lengths) != of_dropped:
                size = first
            if len(lengths) != size:
                lengths = source.choices(lengths, k=size)
            return [min(most, length) for length in lengths], is_kept

        return draw


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
    busy = _busy(events, "train")
    groups, shares = _groups(folder)
    scored = sum(end - start for start, end in _busy(events, "score"))
    costs = Costs(
        _engine(events, busy, engines=engines, most=config.engine.max_num_seqs, cores=cores),
        _trainer(steps),
        UpdateCosts(0.0, fmean([end - start for start, end in _busy(events, "update_weights")] or [0.0]), False),
        reward_s=scored
        / max(1, sum(_num_scorings(config, lengths) for pool in groups.values() for lengths, _ in pool)),
        cores=cores,
    )
    return Calibration(config, costs, slowdown > OVERLOADED, shares, groups)


def _busy(events: Sequence[dict[str, Any]], what: str) -> list[tuple[float, float]]:
    return [(e["start"], e["end"]) for e in events if e.get("event") == "busy" and e.get("what") == what]


def _trainer(steps: Sequence[dict[str, Any]]) -> TrainerCosts:
    """A line through (tokens, CPU seconds) whose slope is the median of those of all pairs: no outlier turns it."""
    points = [(step["tokens_trained"], step["train_cpu_s"] + step.get("publish_s", 0.0)) for step in steps]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] != a[0]]
    most = median(seconds / tokens for tokens, seconds in points)
    token_s = min(max(0.0, median(slopes)) if slopes else most, most)
    return TrainerCosts(max(0.0, median(seconds - token_s * tokens for tokens, seconds in points)), token_s)


def _engine(
    events: Sequence[dict[str, Any]],
    trained: list[tuple[float, float]],
    *,
    engines: float,
    most: int,
    cores: float | None,
) -> EngineCosts:
    """The line seconds * speed / tokens = step_s / c + token_s, by least squares weighted by tokens, none below 0.

    most: sequences of an engine at a time.
    """
    rows = []
    for event in events:
        if event.get("event") != "engine_load" or event["tokens"] < 1:
            continue
        end, seconds, at_work = event["t"], event["seconds"], event.get("at_work", 1.0)
        share = sum(max(0.0, min(end, b) - max(end - seconds, a)) for a, b in trained) / seconds
        alone = min(1.0, cores / engines) if cores else 1.0
        beside = min(1.0, cores / (engines + 1)) if cores else 1.0
        speed = share * beside + (1 - share) * alone
        running = min(event["running"] / at_work, most) if at_work else 0.0
        if running >= 1:
            rows.append((1 / running, at_work * seconds * speed / event["tokens"], event["tokens"]))
    if len(rows) < FEWEST_STRETCHES:
        raise ConfigError(
            "--calibrate",
            [f"the run has {len(rows)} events engine_load with tokens, and {FEWEST_STRETCHES} are needed"],
        )
    return _line(rows)


def _line(rows: Sequence[tuple[float, float, float]]) -> EngineCosts:
    """Rows of (1 / sequences, seconds of a token, weight)."""
    total = math.fsum(w for *_, w in rows)
    mean_x = math.fsum(x * w for x, _, w in rows) / total
    mean_y = math.fsum(y * w for _, y, w in rows) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for x, _, w in rows)
    step_s = math.fsum(w * (x - mean_x) * (y - mean_y) for x, y, w in rows) / spread if spread else 0.0
    step_s = min(max(0.0, step_s), mean_y / mean_x)
    return EngineCosts(step_s, mean_y - step_s * mean_x)


def _groups(folder: Path) -> tuple[dict[tuple[int, str], list[tuple[list[int], bool]]], dict[str, float]]:
    """The groups of a run by step and capability, and the share of each capability in what was trained on."""
    import pyarrow.parquet as pq

    found: dict[tuple[int, str], list[tuple[list[int], bool]]] = defaultdict(list)
    trained: Counter[str] = Counter()
    files = sorted((folder / "rollouts").glob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: no rollouts to draw replies from")
    for number, file in enumerate(files):
        groups: dict[object, list[dict[str, Any]]] = defaultdict(list)
        for row in pq.read_table(file, columns=["group_id", "num_tokens", "status", "capability"]).to_pylist():
            groups[row["group_id"]].append(row)
        for rows in groups.values():
            status, capability = rows[0]["status"], rows[0]["capability"]
            if status not in UNDECIDED:
                kept = status == "trained"
                found[number, capability].append(([row["num_tokens"] for row in rows], kept))
                trained[capability] += kept
    capabilities = {capability for _, capability in found}
    shares = {name: trained[name] / trained.total() for name in capabilities if trained[name]}
    return {key: value for key, value in found.items() if key[1] in shares}, shares


def _num_scorings(config: RlConfig, lengths: Sequence[int]) -> int:
    """How often rewards were waited for: twice for a group that has more than its first replies.

    A run does not tell which of these were sampled whole at once, and so waited for rewards once.
    """
    return 2 if config.first_replies is not None and len(lengths) > config.first_replies else 1


def describe(calibration: Calibration) -> str:
    """The fitted costs in a line of JSON."""
    costs = calibration.costs
    return json.dumps(
        {
            "engine_step_s": costs.engine.step_s,
            "engine_token_s": costs.engine.token_s,
            "trainer_fixed_s": costs.trainer.fixed_s,
            "trainer_token_s": costs.trainer.token_s,
            "update_pause_s": costs.update.pause_s,
            "reward_s": costs.reward_s,
            "cores": costs.cores,
        }
    )
