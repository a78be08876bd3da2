"""How many sampled tokens the selection of prompts saves, in real RL runs, if most prompts teach nothing.

    python benchmarks/rl_curriculum.py [--resume] [--pools 10,30] [--arms uniform,selection] [--seeds 1,2,3] [--dir DIR]

The pools are those of rl_pool.py: 10% or 30% medium prompts; the others are passed always or never. In every arm a step
trains on as many groups with an advantage, all others are dropped and replaced, and steps, batch and rate are equal:

  uniform      all prompts are drawn alike (DAPO)
  band         a profile of 8 replies each, then the prompts with pass rates in [0.1, 0.7] alone, drawn in turn
  selection    prompts drawn by beliefs, without a profile, every group sampled whole
  first_two    the default: the same, and groups begin with two replies
  predictor    as `selection`, and each kind of puzzle (the field `kind` of the rows) has a fitted prior of its own
  predictor_two  as `predictor`, and groups begin with two replies
  oracle       the medium prompts alone, drawn in turn: the bound for anything that has to find them

The target of a pool is the accuracy at the start plus TARGET_SHARE of the smallest gain of an arm, so that all arms
reach it. What counts is the tokens sampled until then, those of dropped groups and of the profile too (the metric
`tokens_sampled_total`); only those of evaluations do not. The tokens that were sampled to make the pool count for no
arm. Core-seconds are the processor time of all processes of the run, without their start, and with evaluations.
Held-out accuracy is the mean over HELDOUT problems with 2 replies at temperature 1, every EVERY policy versions. The
accuracies are made monotone (isotonic regression) and interpolated.

Each run's result is written into benchmarks/results/rl_curriculum.json as soon as it is there (resumable.py).
"""

import math
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from resumable import Results, chosen, folder_of, options
from rl_pool import Pool, make_pools
from scipy.stats import t as student

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig

RESULTS = Path(__file__).parent / "results" / "rl_curriculum.json"
TARGET_SHARE = 0.8
STEPS, EVERY = 48, 8
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
    "selection": {"selection": {"first_replies": None}},
    "first_two": {},
    "predictor": {"selection": {"predictor": "kind", "first_replies": None}},
    "predictor_two": {"selection": {"predictor": "kind"}},
    "oracle": IN_TURN,
}


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
        profiled = [event["t"] for event in read_jsonl(folder / "events.jsonl") if event["event"] == "profile"]
        began = min([steps[0]["t"] - steps[0]["step_wall_s"], *profiled])
        times = [began, *(step["t"] for step in steps)]
        evaluations = list(read_jsonl(folder / "evaluations.jsonl"))
        _check_counted(folder, steps)
        trained = _trained(folder, pool)
    versions = [line["policy_version"] for line in evaluations]
    if versions != list(range(0, STEPS, EVERY)):
        raise RuntimeError(f"not every evaluation of {arm} was done, only those of {versions}")
    names = ("groups_generated", "groups_dropped_zero_advantage", "groups_too_easy", "groups_too_hard")
    total = {name: sum(step[name] for step in steps) for name in names}
    return {
        "tokens": [sampled[version] for version in versions],
        "core_s": [used.at(times[version]) - used.at(began) for version in versions],
        "accuracy": [line["capabilities"]["all"]["accuracy"] for line in evaluations],
        "before_tokens": before, **total, "trained": trained, "seconds": sum(step["step_wall_s"] for step in steps),
    }  # fmt: skip


def _trained(folder: Path, pool: Pool) -> dict[str, float]:
    """What was trained on: how many prompts, what share of them is medium, of which pass rate, how much of it."""
    import pyarrow.parquet as pq

    medium = {row["id"] for row in read_jsonl(Path(pool.medium))}
    columns = ["prompt_id", "group_id", "status", "reward", "advantage", "num_tokens"]
    tables = [pq.read_table(path, columns=columns) for path in sorted((folder / "rollouts").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist() if row["status"] == "trained"]
    groups = {row["group_id"]: row["prompt_id"] for row in rows}
    return {
        "prompts": len(set(groups.values())),
        "medium_share": fmean(prompt in medium for prompt in groups.values()),
        "pass_rate": fmean(row["reward"] >= 0.5 for row in rows),
        "advantage": fmean(abs(row["advantage"]) for row in rows),
        "reply_tokens": fmean(row["num_tokens"] for row in rows),
    }


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


def table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: for each pool and arm what it took to reach the pool's target; of an arm without runs it says so."""
    lines = [
        "| medium prompts | arm | seeds | accuracy, start and end | sampled groups a useful one "
        "| steps, thousand tokens and core-seconds to the target | tokens of `uniform` / tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for pool in ("10", "30"):
        of_pool = {key: run for key, run in runs.items() if key.startswith(f"{pool}/")}
        goal = target(list(of_pool.values()))
        for arm in ARMS:
            found = {key.split("/")[2]: run for key, run in of_pool.items() if key.split("/")[1] == arm}
            if not found:
                lines.append(f"| {pool}% | {arm} | none | not run | | | |")
                continue
            start, end = (fmean(smooth(run["accuracy"])[at] for run in found.values()) for at in (0, -1))
            groups = fmean(run["groups_generated"] / (4 * STEPS) for run in found.values())
            cost = {unit: [to_target(run[unit], run["accuracy"], goal) for run in found.values()] for unit in UNITS}
            tokens, core_s = (fmean(value for value, _, _ in cost[unit]) for unit in UNITS)
            steps = EVERY * fmean(at for _, at, _ in cost["tokens"])
            missed = sum(not reached for _, _, reached in cost["tokens"])
            lines.append(
                f"| {pool}% | {arm} | {', '.join(found)} | {start:.1%}, {end:.1%} | {groups:.1f} | {steps:.0f}, "
                f"{tokens / 1e3:.0f}, {core_s:.0f}{f'; not reached by {missed}' if missed else ''} | "
                f"{_ratio(of_pool, pool, arm, goal=goal)} |"
            )
        lines += [f"| {pool}% | target | | {goal:.1%} | | | |"] if of_pool else []
    return "\n".join(lines)


UNITS = ("tokens", "core_s")
fmean = statistics.fmean


def target(runs: Sequence[dict[str, Any]]) -> float:
    """The accuracy that is to be reached in a pool."""
    if not runs:
        return math.nan
    start = fmean(run["accuracy"][0] for run in runs)
    return start + TARGET_SHARE * (min(smooth(run["accuracy"])[-1] for run in runs) - start)


def _ratio(runs: Mapping[str, dict[str, Any]], pool: str, arm: str, *, goal: float) -> str:
    """The geometric mean over the seeds that both arms have, and Student's 95% interval over the logarithms."""
    logs = []
    for key, run in runs.items():
        other = runs.get(f"{pool}/uniform/{key.split('/')[2]}")
        if key.split("/")[1] == arm and other is not None:
            mine, theirs = (to_target(item["tokens"], item["accuracy"], goal)[0] for item in (run, other))
            logs.append(math.log(theirs / mine))
    if not logs:
        return ""
    if len(logs) == 1:
        return f"{math.exp(logs[0]):.2f}, one seed"
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    low, mean, high = (math.exp(fmean(logs) + side * half) for side in (-1, 0, 1))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


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


def main() -> None:
    parser = options(__doc__, pools="10,30", arms=",".join(ARMS), seeds="1,2,3")
    arguments = parser.parse_args()
    pools, arms = (chosen(parser, *given) for given in ((arguments.pools, ("10", "30")), (arguments.arms, ARMS)))
    keys = [f"{pool}/{arm}/{seed}" for pool in pools for seed in arguments.seeds.split(",") for arm in arms]
    results = Results(RESULTS, keep=arguments.resume or arguments.show)
    if not arguments.show and any(key not in results.runs for key in keys):
        with folder_of(arguments.dir) as folder, ray_session():
            made = make_pools(Path(folder), SETTINGS, (10, 30))

            def run(key: str) -> dict[str, Any]:
                pool, arm, seed = key.split("/")
                return run_arm(Path(folder), made[int(pool)], arm, seed=int(seed))

            results.fill(keys, run, lambda found: f"{found['accuracy']} after {found['tokens'][-1]} tokens")
    print(table(results.runs))


if __name__ == "__main__":
    main()
