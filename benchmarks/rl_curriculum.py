"""Figures of rl.py for the selection of prompts: how many sampled tokens it saves if most prompts teach nothing.

  curriculum_token_ratio   tokens that the arm `uniform` samples until the policy reaches TARGET on held-out problems /
      tokens of the arm `selection`, in the pool with 10% medium prompts; geometric mean over SEEDS. `low` and `high`
      are its 95% interval: Student's t over the logarithms of the ratios, one for each seed. Both arms of a ratio have
      the same seed. Beside it is the same for the other pool, the other arms, and for core-seconds

The pools are those of rl_pool.py: 10% or 30% medium prompts; the others are passed always or never. In every arm a step
trains on as many groups with an advantage, all others are dropped and replaced, and steps, batch and rate are equal:

  uniform     all prompts are drawn alike (DAPO)
  band        a profile of 8 replies each, then the prompts with pass rates in [0.1, 0.7] alone, drawn in turn
  selection   the default: prompts drawn by beliefs, without a profile
  oracle      the medium prompts alone, drawn in turn: the bound for anything that has to find them

Every sampled token counts (the metric `tokens_sampled_total`), those of dropped groups and of the profile too; only
those of evaluations do not. The tokens that were sampled to make the pool count for no arm. Core-seconds are the
processor time of all processes of the run, without their start, and with evaluations. Held-out accuracy is the mean
over HELDOUT problems with 2 replies at temperature 1, every EVERY policy versions. The accuracies are made monotone
(isotonic regression) and interpolated, which gives the tokens to TARGET.

RL_CURRICULUM_DIR names a folder that keeps the pools and each finished run. Without it everything is made anew.
RL_CURRICULUM_ONLY, as 10/selection/1, makes only the runs whose names begin so, and no figure.
"""

import json
import math
import os
import statistics
import tempfile
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
from rl_pool import HELDOUT, Pool, make_pools

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig

SEEDS, SHARES, TARGET = (1, 2, 3), (10, 30), 0.52
STEPS, EVERY = 56, 8
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t at 97.5%, by the number of seeds
SETTINGS: dict[str, Any] = {
    "reward": {"name": "puzzles"}, "steps": STEPS, "groups_per_step": 4, "group_size": 8, "max_staleness": 1,
    "sampling": {"temperature": 1.0, "max_tokens": 64}, "checkpoint_every": STEPS,
    "optimizer": {"learning_rate": 6e-4, "warmup_steps": 4},
    "engine": {"max_model_len": 192, "max_num_seqs": 256, "kv_cache_gib": 0.1},
    "resources": {"rollout": {"cpus": 0.9}, "trainer": {"cpus": 0.9}},
}  # fmt: skip
IN_TURN = {"selection": {"draw": "in_turn"}}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": IN_TURN,
    "band": {**IN_TURN, "profile": {"samples": 8, "band": [0.1, 0.7]}},
    "selection": {},
    "oracle": IN_TURN,
}
Key = tuple[int, str, int]  # percentage of medium prompts, arm, seed


def curriculum_token_ratio() -> tuple[float, dict[str, float]]:
    named, only = os.environ.get("RL_CURRICULUM_DIR"), os.environ.get("RL_CURRICULUM_ONLY", "")
    with nullcontext(named) if named else tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys: list[Key] = [(share, arm, seed) for seed in SEEDS for share in SHARES for arm in ARMS]
        files = {key: folder / f"{key[0]}-{key[1]}-{key[2]}.json" for key in keys}
        wanted = [key for key in keys if "/".join(map(str, key)).startswith(only)]
        if missing := [key for key in wanted if not files[key].exists()]:
            folder.mkdir(parents=True, exist_ok=True)
            with ray_session():
                pools = make_pools(folder, SETTINGS, SHARES)
                for key in missing:
                    files[key].write_text(json.dumps(run_arm(folder, pools[key[0]], key[1], seed=key[2])))
        runs = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    if only:
        return math.nan, {"runs": len(runs)}
    return compare(runs)


def run_arm(scratch: Path, pool: Pool, arm: str, *, seed: int) -> dict[str, Any]:
    """Run one arm. For each evaluation: `tokens` and core-seconds before it, and `accuracy`; also sums over groups."""
    from posttrain.rl.stage import run

    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        data = {
            **SETTINGS, **ARMS[arm], "model": {"path": pool.model, "dtype": "float32"},
            "prompts": {"path": pool.medium if arm == "oracle" else pool.prompts},
            "evaluation": {"data": {"path": pool.heldout}, "every": EVERY, "samples": 2, "temperature": 1.0},
        }  # fmt: skip
        config = validate_config(RlConfig, data, "benchmark")
        with ProcessorTime() as used:
            run(config, StageContext("rl", folder, folder / "events.jsonl", seed, warm_engines=True))
        steps = list(read_jsonl(folder / "metrics.jsonl"))
        before = steps[0]["tokens_sampled_total"] - steps[0]["tokens_generated"]
        sampled = [before, *(step["tokens_sampled_total"] for step in steps)]  # by policy version
        began = steps[0]["t"] - steps[0]["step_wall_s"]
        times = [began, *(step["t"] for step in steps)]
        evaluations = list(read_jsonl(folder / "evaluations.jsonl"))
        _check_counted(folder, steps)
    versions = [line["policy_version"] for line in evaluations]
    if versions != list(range(0, STEPS, EVERY)):
        raise RuntimeError(f"not every evaluation of {arm} was done, only those of {versions}")
    names = ("groups_generated", "groups_dropped_zero_advantage", "groups_too_easy", "groups_too_hard")
    total = {name: sum(step[name] for step in steps) for name in names}
    return {
        "tokens": [sampled[version] for version in versions],
        "core_s": [used.at(times[version]) - used.at(began) for version in versions],
        "accuracy": [line["capabilities"]["all"]["accuracy"] for line in evaluations],
        "before_tokens": before, **total, "seconds": sum(step["step_wall_s"] for step in steps),
    }  # fmt: skip


class ProcessorTime:
    """The processor time of this process and of all that it started, looked at twice a second."""

    def __enter__(self) -> "ProcessorTime":
        self._seen: dict[int, float] = {}
        self._line: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def at(self, time_s: float) -> float:
        """The core-seconds up to a Unix time."""
        return max((used for at, used in self._line if at <= time_s), default=self._line[0][1])

    def _watch(self) -> None:
        import time

        while not self._over.wait(0.5):
            me = psutil.Process()
            for process in (me, *me.children(recursive=True)):
                try:
                    spent = process.cpu_times()
                except psutil.Error:
                    continue
                self._seen[process.pid] = spent.user + spent.system  # that of one that has ended stays
            self._line.append((time.time(), sum(self._seen.values())))


def _check_counted(folder: Path, steps: Sequence[dict[str, Any]]) -> None:
    """Check that the metrics count the generated groups that the archive holds, except for the last ones."""
    import pyarrow.parquet as pq

    files = (folder / "rollouts").glob("*.parquet")
    archived = sum(sum(pq.read_table(path, columns=["num_tokens"])["num_tokens"].to_pylist()) for path in files)
    counted, last = (sum(step["tokens_generated"] for step in part) for part in (steps, steps[-10:]))
    if not counted <= archived <= counted + last:
        raise RuntimeError(f"the steps generated {counted} tokens, but their rollouts have {archived}")


def compare(runs: dict[Key, dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """The figure, and the means over seeds of each arm in each pool."""
    detail: dict[str, float] = {"seeds": len(SEEDS), "target": TARGET, "heldout": HELDOUT}
    for share in SHARES:
        needed = {
            (arm, seed, unit): to_target(runs[share, arm, seed][unit], runs[share, arm, seed]["accuracy"], TARGET)
            for arm in ARMS
            for seed in SEEDS
            for unit in ("tokens", "core_s")
        }
        for arm in ARMS:
            name, of_arm = f"{share}_{arm}", [runs[share, arm, seed] for seed in SEEDS]
            detail[f"{name}_start"] = statistics.fmean(run["accuracy"][0] for run in of_arm)
            detail[f"{name}_final"] = statistics.fmean(smooth(run["accuracy"])[-1] for run in of_arm)
            detail[f"{name}_groups_a_useful"] = statistics.fmean(
                run["groups_generated"] / (4 * STEPS) for run in of_arm
            )
            detail[f"{name}_ktokens"] = statistics.fmean(needed[arm, seed, "tokens"][0] for seed in SEEDS) / 1e3
            detail[f"{name}_core_s"] = statistics.fmean(needed[arm, seed, "core_s"][0] for seed in SEEDS)
            detail[f"{name}_steps"] = EVERY * statistics.fmean(needed[arm, seed, "tokens"][1] for seed in SEEDS)
            detail[f"{name}_reached"] = sum(needed[arm, seed, "tokens"][2] for seed in SEEDS)
            for unit in ("tokens", "core_s"):
                logs = [math.log(needed["uniform", seed, unit][0] / needed[arm, seed, unit][0]) for seed in SEEDS]
                mean, half = statistics.fmean(logs), T95[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
                for what, value in (("ratio", mean), ("low", mean - half), ("high", mean + half)):
                    detail[f"{name}_{unit}_{what}"] = math.exp(value)
    return detail[f"{SHARES[0]}_selection_tokens_ratio"], detail


def smooth(values: Sequence[float]) -> list[float]:
    """The nearest sequence, by least squares, that never falls (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def to_target(spent: Sequence[float], accuracy: Sequence[float], target: float) -> tuple[float, float, bool]:
    """What was spent and evaluations until `target`, interpolated, and True; if never reached, all and False."""
    rising = smooth(accuracy)
    for index in range(1, len(rising)):
        if rising[index] >= target:
            rise = rising[index] - rising[index - 1]
            share = min(1.0, max(0.0, (target - rising[index - 1]) / rise)) if rise > 0 else 0.0
            return spent[index - 1] + share * (spent[index] - spent[index - 1]), index - 1 + share, True
    return spent[-1], len(spent) - 1, False
