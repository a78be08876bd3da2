"""RL on a mixture of modalities against experts of one modality each, at the size of the visual quick start.

    python benchmarks/modalities.py [--resume] [--arms quotas,curriculum,text,image,multi-image] [--seeds 0,1,2]
        [--dir DIR] [--show]

An arm is the RL of `quickstart-vision` with other shares of the modalities. It starts from the base and the SFT of a
whole run of the same seed. `quotas` has fixed shares, `curriculum` moves them by measured progress, and an expert
trains on one modality alone. An expert has as many groups of its modality as `quotas`, so it has fewer steps. The
result of each arm and seed is written into benchmarks/results/modalities.json as soon as it is there (resumable.py
says what the options do). In the end a table shows, for each modality, the accuracy of the mixture minus that of the
expert.

Accuracy is greedy, on the held-out puzzles of a modality. Intervals are Student's over seeds.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from quickstart import run_seed
from recipe_table import interval
from resumable import run_arms

from posttrain.resources import bundled_dir

RESULTS = Path(__file__).parent / "results" / "modalities.json"
PIPELINE = bundled_dir("pipelines") / "quickstart-vision.yaml"
CONFIGS = bundled_dir("configs") / "quickstart-vision"
MODALITIES = ("text", "image", "multi-image")
MIXED = ("quotas", "curriculum")
ARMS = (*MIXED, *MODALITIES)


def run_arm(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Run an arm in a folder of `folder`, from what it shares with the quick start there. Returns its figures."""
    trunk, place = folder / f"quickstart-vision-{seed}", folder / f"{arm}-{seed}"
    run_seed(seed, trunk, str(PIPELINE))
    if arm == "quotas":  # the quick start itself
        return _figures(trunk)
    if not place.exists():
        shutil.copytree(trunk, place, ignore=shutil.ignore_patterns(".lock", "rl", "dpo"))
    pipeline = place.with_suffix(".yaml")
    names = ("base", "filter", "sft", "rl")
    stages = [{"name": name, "kind": name, "config": str(CONFIGS / f"{name}.yaml")} for name in names]
    evaluate = {"config": str(CONFIGS / "eval.yaml"), "stages": ["rl"]}
    # The name is that of the run which is copied.
    whole = {"name": "quickstart-vision", "warm_engines": True, "stages": stages, "evaluate": evaluate}
    pipeline.write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "posttrain.cli.main", "run", str(pipeline), f"seed={seed}", *_keys(arm)]
    subprocess.run([*command, "--run-dir", str(place), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return _figures(place)


def _keys(arm: str) -> list[str]:
    """The keys of RL that an arm changes."""
    if arm == "curriculum":
        return ["rl.modality_curriculum={}"]
    config = yaml.safe_load((CONFIGS / "rl.yaml").read_text())
    shares = config["modalities"]
    steps = round(config["steps"] * shares[arm] / sum(shares.values()))
    return [f"rl.modalities={json.dumps({arm: 1.0})}", f"rl.steps={steps}"]


def _figures(place: Path) -> dict[str, Any]:
    summary = json.loads((place / "summary.json").read_text())["eval"]["rl"]
    steps = [json.loads(line) for line in (place / "rl" / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": {name: summary[f"modality: {name}"]["greedy"] for name in MODALITIES},
        "ci95": {name: summary[f"modality: {name}"]["greedy_ci95"] for name in MODALITIES},
        "steps": len(steps),
        "tokens": steps[-1]["tokens_sampled_total"],
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each modality, with the mixture minus the expert in points."""
    lines = ["| modality | expert | " + " | ".join(f"{arm} - expert, points" for arm in MIXED) + " |"]
    lines.append("|---|---|" + "---|" * len(MIXED))
    for modality in MODALITIES:
        experts = {key.partition("/")[2]: run for key, run in runs.items() if key.partition("/")[0] == modality}
        if not experts:
            lines.append(f"| {modality} | not run |" + " |" * len(MIXED))
            continue
        cells = [f"{fmean(run['accuracy'][modality] for run in experts.values()):.1%}"]
        for arm in MIXED:
            both = [seed for seed in experts if f"{arm}/{seed}" in runs]
            values = [
                100 * (runs[f"{arm}/{seed}"]["accuracy"][modality] - experts[seed]["accuracy"][modality])
                for seed in both
            ]
            cells.append(_said(values))
        lines.append(f"| {modality} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(values: list[float]) -> str:
    if not values:
        return "not run"
    bounds = interval(values)
    seeds = ", ".join(f"{value:+.1f}" for value in values)
    return f"{fmean(values):+.1f} ({seeds})" + (f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else "")


def _shown(found: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {value:.1%}" for name, value in found["accuracy"].items())
    return f"{shares} after {found['steps']} steps, {found['tokens']} tokens"


def main() -> None:
    print(table(run_arms(__doc__, RESULTS, ARMS, run=run_arm, shown=_shown)))


if __name__ == "__main__":
    main()
