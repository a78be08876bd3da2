"""RL on a mixture of modalities against experts of one modality each, at the size of the visual quick start.

    python benchmarks/modalities.py [--resume] [--arms quotas,curriculum,text,image,multi-image] [--seeds 0,1,2]
        [--dir DIR] [--show]

An arm is the RL of `quickstart-vision` with other shares of the modalities. It starts from the base and the SFT of a
whole run of the same seed, which is made once. `quotas` is the RL of that run and has fixed shares; `curriculum` moves
them by measured progress; an expert trains on one modality alone. Each step of an expert has the groups that a step of
`quotas` has of its modality, so both make as many steps. If the expert has trained on fewer tokens of the modality than
`quotas` at the end, it goes on until it has not. So the mixture gets no token of a modality more than the expert, and
the others besides.

The result of each arm and seed is written into benchmarks/results/modalities.json as soon as it is there (resumable.py
says what the options do). With --dir, a run that is stopped goes on from its last checkpoint. In the end a table shows,
for each modality, the accuracy of the mixture minus that of the expert.

Accuracy is greedy, on the held-out puzzles of a modality. Intervals are Student's over seeds.
"""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from quickstart import run_seed
from recipe_table import interval
from resumable import run_arms

from posttrain.data.images.render import pictures_of
from posttrain.files import replacing
from posttrain.resources import bundled_dir
from posttrain.rl.history.recorded import read_rollouts

RESULTS = Path(__file__).parent / "results" / "modalities.json"
PIPELINE = bundled_dir("pipelines") / "quickstart-vision.yaml"
CONFIGS = bundled_dir("configs") / "quickstart-vision"
MODALITIES = ("text", "image", "multi-image")  # no picture, one, several
MIXED = ("quotas", "curriculum")
ARMS = (*MIXED, *MODALITIES)


def run_arm(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Run an arm in a folder of `folder`, from what it shares with the quick start there. Returns its figures."""
    trunk, place = folder / f"quickstart-vision-{seed}", folder / f"{arm}-{seed}"
    run_seed(seed, trunk, str(PIPELINE))
    of_quotas = _figures(trunk)
    if arm == "quotas":
        return of_quotas
    if not place.exists():
        with replacing(place) as aside:
            shutil.copytree(trunk, aside, ignore=shutil.ignore_patterns(".lock", "summary.json", "rl", "dpo"))
    if arm == "curriculum":
        return _train(place, seed, ["rl.modality_curriculum={}"])
    groups, steps = _sizes(arm)
    steps = max(steps, _asked_steps(place))
    keys = [f"rl.modalities={json.dumps({arm: 1.0})}", f"rl.groups_per_step={groups}"]
    found = _train(place, seed, [*keys, f"rl.steps={steps}"])
    if (missing := of_quotas["trained_tokens"][arm] / found["trained_tokens"][arm]) > 1:
        found = _train(place, seed, [*keys, f"rl.steps={math.ceil(steps * missing)}"])
    return found


def _sizes(modality: str) -> tuple[int, int]:
    """Groups in a step of the expert, and its steps: together as many groups of the modality as `quotas` has."""
    config = yaml.safe_load((CONFIGS / "rl.yaml").read_text())
    shares = config["modalities"]
    in_a_step = config["groups_per_step"] * shares[modality] / sum(shares.values())
    return round(in_a_step), round(config["steps"] * in_a_step / round(in_a_step))


def _asked_steps(place: Path) -> int:
    """The steps of an expert's RL that was begun before, and may have been asked to go on; 0 if there is none."""
    config = place / "rl" / "config.yaml"
    return yaml.safe_load(config.read_text())["steps"] if config.exists() else 0


def _train(place: Path, seed: int, keys: list[str]) -> dict[str, Any]:
    """Run or continue RL with these keys in a copy of the trunk, and evaluate it. Returns its figures."""
    pipeline = place.with_suffix(".yaml")
    names = ("base", "filter", "sft", "rl")
    stages = [{"name": name, "kind": name, "config": str(CONFIGS / f"{name}.yaml")} for name in names]
    evaluate = {"config": str(CONFIGS / "eval.yaml"), "stages": ["rl"]}
    # The name is that of the run which is copied.
    whole = {"name": "quickstart-vision", "warm_engines": True, "stages": stages, "evaluate": evaluate}
    pipeline.write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "posttrain.cli.main", "run", str(pipeline), f"seed={seed}", *keys]
    subprocess.run([*command, "--run-dir", str(place), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return _figures(place)


def _figures(place: Path) -> dict[str, Any]:
    summary = json.loads((place / "summary.json").read_text())
    found, stages = summary["eval"]["rl"], {stage["name"]: stage for stage in summary["stages"]}
    steps = [json.loads(line) for line in (place / "rl" / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": {name: found[f"modality: {name}"]["greedy"] for name in MODALITIES},
        "ci95": {name: found[f"modality: {name}"]["greedy_ci95"] for name in MODALITIES},
        "steps": len(steps),
        "tokens": steps[-1]["tokens_sampled_total"],
        "trained_tokens": _trained_tokens(place / "rl"),
        "rl_s": stages["rl"]["wall_s"],
    }


def _trained_tokens(stage: Path) -> dict[str, int]:
    """The sampled tokens of each modality that an RL stage has trained on."""
    counts: Counter[str] = Counter(dict.fromkeys(MODALITIES, 0))
    for item in read_rollouts(stage):
        if item.status == "trained":
            shown = len(pictures_of(item.rollout.prompt.messages))
            counts[MODALITIES[min(shown, 2)]] += sum(
                len(segment.token_ids) for segment in item.rollout.segments if segment.trained
            )
    return dict(counts)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each modality, with the mixture minus the expert in points."""
    ends = " | ".join(f"{arm} - expert, points | {arm} / expert, tokens" for arm in MIXED)
    lines = [f"| modality | expert | {ends} |", "|---|---|" + "---|---|" * len(MIXED)]
    for modality in MODALITIES:
        experts = {key.partition("/")[2]: run for key, run in runs.items() if key.partition("/")[0] == modality}
        if not experts:
            lines.append(f"| {modality} | not run |" + " | |" * len(MIXED))
            continue
        cells = [f"{fmean(run['accuracy'][modality] for run in experts.values()):.1%}"]
        for arm in MIXED:
            both = [seed for seed in experts if f"{arm}/{seed}" in runs]
            values = [
                100 * (runs[f"{arm}/{seed}"]["accuracy"][modality] - experts[seed]["accuracy"][modality])
                for seed in both
            ]
            ratios = [
                runs[f"{arm}/{seed}"]["trained_tokens"][modality] / experts[seed]["trained_tokens"][modality]
                for seed in both
            ]
            cells += [_said(values), f"{fmean(ratios):.2f}" if ratios else ""]
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
    trained = ", ".join(f"{name} {count}" for name, count in found["trained_tokens"].items())
    return f"{shares} after {found['steps']} steps in {found['rl_s']:.0f} s; tokens trained on: {trained}"


def main() -> None:
    print(table(run_arms(__doc__, RESULTS, ARMS, run=run_arm, shown=_shown)))


if __name__ == "__main__":
    main()
