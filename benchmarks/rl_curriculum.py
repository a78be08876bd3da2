"""Figure of rl.py for the curriculum: how many sampled tokens it saves if most prompts teach nothing.

  curriculum_token_ratio   tokens that the arm `uniform` samples until the policy reaches TARGET on held-out problems /
      tokens of the arm `curriculum`; geometric mean over SEEDS. `curriculum_low` and `curriculum_high` are its 95%
      interval: Student's t over the logarithms of the ratios, one for each seed. Both arms of a ratio have the same
      seed

The pool is that of rl_pool.py: 30% medium prompts; the others are passed always or never. The arms differ only in this:

  uniform      all prompts are drawn alike, and groups without an advantage are trained on like the others
  refill       groups without an advantage are dropped and replaced
  curriculum   as `refill`, with a short profile of its own, and with prompts drawn by their beliefs

Every sampled token counts (the metric `tokens_sampled_total`), those of dropped groups, of the profile and of probes
too; only those of evaluations do not. The tokens that were sampled to make the pool count for no arm. `uniform` and
`refill` take their estimates of prompts from the pool, since they make no use of them. Held-out accuracy is the mean
over HELDOUT problems with 2 replies at temperature 1, every EVERY policy versions. The accuracies are made monotone
(isotonic regression) and interpolated, which gives the tokens to TARGET.

TARGET is 80% of the way from the start to the best of `uniform` in a run of seed 0, which is not among SEEDS. Batch,
learning rate and profile were chosen with that seed too.

Two things limit the figure on this policy. A batch with three times as many groups that teach needs only a quarter
fewer steps, because the optimizer limits the rate of learning. And each step costs more tokens, by refills and longer
replies.

RL_CURRICULUM_DIR names a folder that keeps the pool and each finished run. Without it everything is made anew.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rl_pool import HELDOUT, Pool, make_pool

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig

SEEDS, TARGET = (1, 2, 3), 0.52
STEPS, EVERY = 67, 8
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t at 97.5%, by the number of seeds
SETTINGS: dict[str, Any] = {
    "reward": {"name": "puzzles"}, "steps": STEPS, "groups_per_step": 4, "group_size": 8, "max_staleness": 1,
    "sampling": {"temperature": 1.0, "max_tokens": 64}, "checkpoint_every": STEPS,
    "optimizer": {"learning_rate": 6e-4, "warmup_steps": 4},
    "engine": {"max_model_len": 192, "max_num_seqs": 256, "kv_cache_gib": 0.1},
    "resources": {"rollout": {"cpus": 0.9}, "trainer": {"cpus": 0.9}},
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"drop_zero_advantage": False, "profile": {"samples": 1, "band": [0.0, 1.0]}},
    "refill": {"profile": {"samples": 1, "band": [0.0, 1.0]}},
    "curriculum": {
        "profile": {"samples": 3, "band": [0.3, 0.7]},
        "curriculum": {"schedule": "constant", "first": [0.1, 0.8]},
        "refilter": {"every": 10, "prompts": 8, "samples": 4},
    },
}


def curriculum_token_ratio() -> tuple[float, dict[str, float]]:
    named = os.environ.get("RL_CURRICULUM_DIR")
    with nullcontext(named) if named else tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {(arm, seed): folder / f"{arm}-{seed}.json" for seed in SEEDS for arm in ARMS}
        if missing := [key for key, file in files.items() if not file.exists()]:
            folder.mkdir(parents=True, exist_ok=True)
            with ray_session():
                for arm, seed in missing:
                    run = run_arm(folder, make_pool(folder, SETTINGS), arm, seed=seed)
                    files[arm, seed].write_text(json.dumps(run))
        runs = {key: json.loads(file.read_text()) for key, file in files.items()}
        composition = json.loads((folder / "pool.json").read_text())["composition"]
    return compare(runs, composition)


def run_arm(scratch: Path, pool: Pool, arm: str, *, seed: int) -> dict[str, Any]:
    """Run one arm. For each evaluation: `tokens` sampled before it, and `accuracy`; also sums over the arm's groups."""
    from posttrain.rl.stage import run

    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        data = {
            **SETTINGS, **ARMS[arm], "model": {"path": pool.model, "dtype": "float32"},
            "prompts": {"path": pool.prompts},
            "evaluation": {"data": {"path": pool.heldout}, "every": EVERY, "samples": 2, "temperature": 1.0},
        }  # fmt: skip
        if "curriculum" not in data:
            data["profile"] = data["profile"] | {"store": pool.store}  # it has all prompts, so none is sampled
        config = validate_config(RlConfig, data, "benchmark")
        run(config, StageContext("rl", folder, folder / "events.jsonl", seed, warm_engines=True))
        steps = list(read_jsonl(folder / "metrics.jsonl"))
        before = steps[0]["tokens_sampled_total"] - steps[0]["tokens_generated"] - steps[0].get("tokens_probed", 0)
        sampled = [before, *(step["tokens_sampled_total"] for step in steps)]  # by policy version
        evaluations = list(read_jsonl(folder / "evaluations.jsonl"))
        _check_counted(folder, steps)
    if (versions := [line["policy_version"] for line in evaluations]) != list(range(0, STEPS, EVERY)):
        raise RuntimeError(f"not every evaluation of {arm} was done, only those of {versions}")
    names = ("groups_generated", "groups_dropped_zero_advantage", "groups_too_easy", "groups_too_hard")
    total = {name: sum(step[name] for step in steps) for name in names}
    return {
        "tokens": [sampled[line["policy_version"]] for line in evaluations],
        "accuracy": [line["capabilities"]["all"]["accuracy"] for line in evaluations],
        "profile_tokens": before, **total, "advantage_std": statistics.fmean(step["advantage_std"] for step in steps),
        "seconds": sum(step["step_wall_s"] for step in steps),
    }  # fmt: skip


def _check_counted(folder: Path, steps: Sequence[dict[str, Any]]) -> None:
    """Check that the metrics count the generated groups that the archive holds, except for the last ones."""
    import pyarrow.parquet as pq

    files = (folder / "rollouts").glob("*.parquet")
    archived = sum(sum(pq.read_table(path, columns=["num_tokens"])["num_tokens"].to_pylist()) for path in files)
    counted, last = (sum(step["tokens_generated"] for step in part) for part in (steps, steps[-10:]))
    if not counted <= archived <= counted + last:
        raise RuntimeError(f"the steps generated {counted} tokens, but their rollouts have {archived}")


def compare(runs: dict[tuple[str, int], dict[str, Any]], composition: dict[str, int]) -> tuple[float, dict[str, float]]:
    """The figure, and the means over seeds of each arm."""
    seeds = sorted({seed for _, seed in runs})
    detail: dict[str, float] = {"seeds": len(seeds), "target": TARGET, "heldout": HELDOUT}
    detail |= {f"pool_{name}": count for name, count in composition.items()}
    needed = {key: to_target(run["tokens"], run["accuracy"], TARGET) for key, run in runs.items()}
    for arm in ARMS:
        of_arm = [runs[arm, seed] for seed in seeds]
        detail[f"{arm}_start"] = statistics.fmean(run["accuracy"][0] for run in of_arm)
        detail[f"{arm}_final"] = statistics.fmean(smooth(run["accuracy"])[-1] for run in of_arm)
        detail[f"{arm}_ktokens"] = statistics.fmean(run["tokens"][-1] for run in of_arm) / 1e3
        detail[f"{arm}_ktokens_to_target"] = statistics.fmean(needed[arm, seed][0] for seed in seeds) / 1e3
        detail[f"{arm}_steps_to_target"] = EVERY * statistics.fmean(needed[arm, seed][1] for seed in seeds)
        detail[f"{arm}_reached"] = sum(needed[arm, seed][2] for seed in seeds)
    profiled = statistics.fmean(runs["curriculum", seed]["profile_tokens"] for seed in seeds)
    detail["curriculum_profile_ktokens"] = profiled / 1e3
    for arm in ("refill", "curriculum"):
        logs = [math.log(needed["uniform", seed][0] / needed[arm, seed][0]) for seed in seeds]
        mean, half = statistics.fmean(logs), T95[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
        ratio = {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}
        detail |= {f"{arm}_{name}": value for name, value in ratio.items()}
    return detail.pop("curriculum_ratio"), detail


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


def to_target(tokens: Sequence[float], accuracy: Sequence[float], target: float) -> tuple[float, float, bool]:
    """Tokens and evaluations until `target`, interpolated, and True; if it is never reached, all of them and False."""
    rising = smooth(accuracy)
    for index in range(1, len(rising)):
        if rising[index] >= target:
            rise = rising[index] - rising[index - 1]
            share = min(1.0, max(0.0, (target - rising[index - 1]) / rise)) if rise > 0 else 0.0
            return tokens[index - 1] + share * (tokens[index] - tokens[index - 1]), index - 1 + share, True
    return tokens[-1], len(tokens) - 1, False
