"""Run a whole quick start from random weights, once for each seed, and measure it.

The figures are time, peak memory, accuracy after each stage, over all and by capability and modality, and overlap.

    python benchmarks/quickstart.py [--pipeline quickstart-vision|tools] [--seeds 0,1,2] [--json FILE] [--dir DIR]

Each seed trains its own base (no cache) and runs every stage and evaluation. DIR keeps the runs; those that are there
are not made again. Accuracies are on the held-out set, which was not used to choose any setting. The overlap is that of
generation and training, between the first and the last optimizer step.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from resumable import folder_of

from posttrain.files import read_jsonl
from posttrain.report.busy import measure_overlap

STAGES = ("base", "sft", "rl")  # that every pipeline here has; some have dpo too


def run_seed(seed: int, folder: Path, pipeline: str = "quickstart", *, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a whole run in `folder`, which is made unless it is there. pipeline: a bundled name, or a file.

    keys: overrides, such as rl.steps=10.
    """
    told = folder / "summary.json"
    if not told.exists() or not set(STAGES) <= json.loads(told.read_text()).get("eval", {}).keys():
        command = [sys.executable, "-m", "posttrain.cli.main", "run", pipeline, f"seed={seed}", *keys]
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "POSTTRAIN_CACHE": cache}
            subprocess.run([*command, "--run-dir", str(folder)], check=True, env=environment, stdout=subprocess.DEVNULL)
    summary = json.loads(told.read_text())
    evals, stages = summary["eval"], [name for name in (*STAGES, "dpo") if name in summary["eval"]]
    overlap = measure_overlap([event for event in read_jsonl(folder / "events.jsonl") if event["stage"] == "rl"])
    assert overlap is not None
    return {
        "seed": seed,
        "wall_s": summary["wall_s"],
        "peak_rss_gib": summary["peak_rss_gib"],
        "stages_s": {stage["name"]: stage["wall_s"] for stage in summary["stages"]},
        "greedy": {name: evals[name]["all"]["greedy"] for name in stages},
        "greedy_ci95": {name: evals[name]["all"]["greedy_ci95"] for name in stages},
        "parts": {part: _greedy(evals, part, stages) for part in evals["base"] if part != "all"},
        "pass@k": {name: evals[name]["all"]["pass@k"] for name in stages},
        "gain_points": 100 * (evals["rl"]["all"]["greedy"] - evals["sft"]["all"]["greedy"]),
        "t_gen_s": overlap.gen_s,
        "t_train_s": overlap.train_s,
        "overlap_s": overlap.both_s,
        "overlap_share": overlap.share,
        "overlap_goal": overlap.goal,
        "versions": summary["versions"],
    }


def _greedy(found: dict[str, Any], part: str, stages: list[str]) -> dict[str, list[float]]:
    """The greedy accuracy in a capability or modality after each stage, with its interval."""
    return {name: [found[name][part]["greedy"], *found[name][part]["greedy_ci95"]] for name in stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="quickstart")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    print(f"{'seed':>6} {'wall':>6} {'GiB':>5} {'base':>6} {'sft':>6} {'rl':>6} {'dpo':>6} {'gain':>6}  overlap (goal)")
    for seed in map(int, arguments.seeds.split(",")):
        with folder_of(arguments.dir) as folder:
            name = Path(arguments.pipeline).stem
            run = run_seed(seed, Path(folder) / f"{name}-{seed}", arguments.pipeline)
        runs.append(run)
        greedy = run["greedy"]
        accuracies = " ".join(f"{greedy[name]:6.1%}" if name in greedy else " " * 6 for name in (*STAGES, "dpo"))
        print(
            f"{seed:6d} {run['wall_s']:6.0f} {run['peak_rss_gib']:5.1f} {accuracies} {run['gain_points']:6.1f}  "
            f"{run['overlap_s']:.0f} s of T_gen {run['t_gen_s']:.0f}, T_train {run['t_train_s']:.0f}: "
            f"{run['overlap_share']:.2f} ({run['overlap_goal']:.2f})",
            flush=True,
        )
        for part, values in run["parts"].items():
            shares = "  ".join(
                f"{name} {values[name][0]:.1%} ({values[name][1]:.0%}-{values[name][2]:.0%})" for name in values
            )
            print(f"       {part:24} {shares}", flush=True)
    medians = {
        name: median(run[name] for run in runs) for name in ("wall_s", "peak_rss_gib", "gain_points", "overlap_share")
    }
    medians |= {f"greedy_{name}": median(run["greedy"][name] for run in runs) for name in runs[0]["greedy"]}
    print("median " + "  ".join(f"{name} {value:.3g}" for name, value in medians.items()))
    if arguments.json:
        result = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "median": medians, "runs": runs}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
