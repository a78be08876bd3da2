"""What each part of the recipe does for the result, at the size of the quick start: one part changed at a time.

    python benchmarks/recipe.py [--resume] [--arms recipe,band] [--seeds 0,1,2] [--dir DIR] [--show]

An arm is the quick start without DPO and with some keys changed. All but one sample every group whole, as the quick
start did when the first of them were run: what is compared must not differ in this. An arm starts from the base, the
filter and the SFT of a whole quick start of the same seed (quickstart.py), where these are the same. So a difference
comes from what was changed, and from chance. The result of each arm and seed is written into
benchmarks/results/recipe.json as soon as it is there, so that runs may be made in pieces (resumable.py says what the
options do). In the end docs/recipe.md is written and docs/recipe.svg drawn.

Accuracy is greedy, on 400 held-out puzzles; pass@8 is of 100 of them. How often instructions are followed is measured
on the same puzzles, with the instruction as a system turn.
"""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from quickstart import run_seed
from recipe_table import page, picture
from resumable import run_arms

from posttrain.files import read_jsonl, write_jsonl
from posttrain.resources import bundled_dir

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results" / "recipe.json", HERE.parent / "docs"
CONTROL = "recipe"
WHOLE = ("rl.selection.first_replies=null",)  # of every arm that does not set rl.selection itself
FOLLOWED = {"worked": "Show your work.", "alone": "Give the answer alone."}
CHECKED = [{"text": "", "weight": 2}] + [
    {"text": text, "verifier": {"name": f"{HERE / 'recipe_checks.py'}:{name}", "weight": 0.3}}
    for name, text in FOLLOWED.items()
]


@dataclass(frozen=True)
class Arm:
    """A variant of the quick start. claim: what it tests, in words. keys: overrides. against: the arm that it is
    compared with.

    dpo: whether DPO follows RL. is_followed: whether it is measured how often the model follows instructions.
    """

    text: str
    claim: str = ""
    keys: tuple[str, ...] = ()
    against: str = CONTROL
    dpo: bool = False
    is_followed: bool = False


ARMS = {
    CONTROL: Arm("the quick start, without DPO, every group sampled whole"),
    "random_half": Arm(
        "SFT on a random half of the rows, not the judge's",
        "The half that the judge keeps is worth more than a random half",
        ("sft.data.path=RANDOM_HALF",),
    ),
    "all_rows": Arm(
        "SFT on all rows",
        "The half that the judge keeps is worth more than all rows",
        ("sft.data.path=${base.sft_data}",),
    ),
    "heavy_sft": Arm("heavy SFT: 8 epochs", "Light SFT leaves more to RL than heavy SFT", ("sft.epochs=8",)),
    "band": Arm(
        "prompts of a profile's band in turn, which is fixed before RL",
        "A band of medium prompts that a profile found is enough, and prompts need not be selected while RL runs",
        ("rl.profile={samples: 8, prompts: 600, band: [0.1, 0.7]}", "rl.selection={draw: in_turn}"),
    ),
    "in_turn": Arm(
        "all prompts in turn", "Prompts need no selection", ("rl.profile=null", "rl.selection={draw: in_turn}")
    ),
    "first_two": Arm(
        "groups begin with two replies, as in the quick start now",
        "Groups may begin with two replies, and go on where these disagree",
        ("rl.selection={first_replies: 2}", "rl.profile=null"),
    ),
    "no_replacement": Arm(
        "groups without an advantage are not replaced",
        "Groups without an advantage need not be replaced",
        ("rl.drop_zero_advantage=false",),
    ),
    "plain": Arm(
        "RL without system instructions",
        "Varied system instructions cost nothing",
        ("rl.systems.instructions=[]",),
        is_followed=True,
    ),
    "checked": Arm(
        "RL with system instructions that are checked",
        "Rewarding that instructions are followed costs nothing",
        (f"rl.systems.instructions={json.dumps(CHECKED)}",),
        against="plain",
        is_followed=True,
    ),
    **{
        f"staleness_{bound}": Arm(
            f"max_staleness {bound} (the quick start has 3)",
            claim,
            (f"rl.max_staleness={bound}",),
        )
        for bound, claim in (
            (0, "RL needs replies of its own version"),
            (1, "Replies may be one version old"),
            (4, "Replies may be four versions old"),
            (8, "Replies may be eight versions old"),
        )
    },
    "kv_keep": Arm(
        "replies go on with the cache of the old weights",
        "What the engine computed with old weights may be kept",
        ("rl.weights.kv=keep",),
    ),
    "dpo_light": Arm("then light DPO, as in the quick start", "Light DPO after RL helps", dpo=True),
    "dpo_heavy": Arm(
        "then heavy DPO: 10 times the rate, 3 epochs",
        "Heavy DPO after RL helps",
        ("dpo.optimizer.learning_rate=1e-3", "dpo.epochs=3"),
        dpo=True,
    ),
}


def run_arm(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Run an arm in a folder of `folder`, from what it shares with the quick start there. Returns its figures."""
    arm, trunk, place = ARMS[name], folder / f"quickstart-{seed}", folder / f"{name}-{seed}"
    run_seed(seed, trunk, keys=WHOLE)
    if not arm.keys:  # the control itself
        return _figures(arm, trunk)
    if not place.exists():  # stages that are not as in the quick start are left out, so that none of them is continued
        others = ["dpo", *([] if arm.dpo else ["rl"]), *(["sft"] if arm.keys[0].startswith("sft.") else [])]
        shutil.copytree(trunk, place, ignore=shutil.ignore_patterns(".lock", *others))
    half = _random_half(trunk, place.with_suffix(".half.jsonl"), seed)
    keys = [*WHOLE, *(key.replace("RANDOM_HALF", str(half)) for key in arm.keys)]
    pipeline = place.with_suffix(".yaml")
    pipeline.write_text(yaml.safe_dump(_pipeline(arm, trunk, place)))
    command = [sys.executable, "-m", "posttrain.cli.main", "run", str(pipeline), f"seed={seed}", *keys]
    subprocess.run([*command, "--run-dir", str(place), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return _figures(arm, place)


def _figures(arm: Arm, place: Path) -> dict[str, Any]:
    summary = json.loads((place / "summary.json").read_text())
    steps = list(read_jsonl(place / "rl" / "metrics.jsonl"))
    final = "dpo" if arm.dpo else "rl"
    result = {
        "greedy": {stage: summary["eval"][stage]["all"]["greedy"] for stage in ("sft", final)},
        "pass@k": {stage: summary["eval"][stage]["all"]["pass@k"] for stage in ("sft", final)},
        "by_capability": {key: value["greedy"] for key, value in summary["eval"][final].items()},
        "accuracy": summary["eval"][final]["all"]["greedy"],
        "rl_tokens": steps[-1]["tokens_sampled_total"],
        "rl_groups": sum(step["groups_generated"] for step in steps),
        "rl_steps": len(steps),
        "rl_s": steps[-1]["t"] - steps[0]["t"] + steps[0]["step_wall_s"],
        "stages_s": {stage["name"]: stage["wall_s"] for stage in summary["stages"] if stage["status"] == "done"},
    }
    if arm.is_followed:
        shown = {key: _worked(place / key) for key in FOLLOWED}
        result["followed"] = {"worked": shown["worked"], "alone": 1 - shown["alone"]}
    return result


def _pipeline(arm: Arm, trunk: Path, place: Path) -> dict[str, Any]:
    configs = bundled_dir("configs") / "quickstart"
    names = ["base", "filter", "sft", "rl", *(["dpo"] if arm.dpo else [])]
    stages: list[dict[str, Any]] = [{"name": n, "kind": n, "config": str(configs / f"{n}.yaml")} for n in names]
    evaluate = str(configs / "eval.yaml")
    if arm.is_followed:
        read = yaml.safe_load(Path(evaluate).read_text())
        for key, text in FOLLOWED.items():
            path = _instructed(trunk / "base" / "data" / "heldout.jsonl", place.with_suffix(f".{key}.jsonl"), text)
            config = {**read, "model": {**read["model"], "path": "${rl.model}"}, "data": {"path": path}, "samples": 0}
            stages.append({"name": key, "kind": "eval", "config": config})
    return {
        "name": "quickstart",  # that of the run which is copied
        "warm_engines": True,
        "stages": stages,
        "evaluate": {"config": evaluate, "stages": ["sft", names[-1]]},
    }


def _random_half(trunk: Path, path: Path, seed: int) -> Path:
    """As many rows of each capability as the judge kept, picked at random."""
    rows = list(read_jsonl(trunk / "base" / "data" / "sft.jsonl"))
    wanted = Counter(row["capability"] for row in read_jsonl(trunk / "filter" / "kept.jsonl"))
    random.Random(seed).shuffle(rows)
    chosen, counts = [], Counter[str]()
    for row in rows:
        counts[row["capability"]] += 1
        if counts[row["capability"]] <= wanted[row["capability"]]:
            chosen.append(row)
    write_jsonl(path, chosen)
    return path


def _instructed(heldout: Path, path: Path, text: str) -> str:
    turn = {"role": "system", "content": text}
    write_jsonl(path, [{**row, "messages": [turn, *row["messages"]]} for row in read_jsonl(heldout)])
    return str(path)


def _worked(stage: Path) -> float:
    return json.loads((stage / "results.json").read_text())["all"]["observed"]["worked"]["share"]


def main() -> None:
    runs = run_arms(
        __doc__,
        RESULTS,
        ARMS,
        run=run_arm,
        shown=lambda found: f"{found['accuracy']:.1%}, {found['rl_tokens']} tokens in RL",
    )
    (DOCS / "recipe.svg").write_text(picture(ARMS, runs))
    (DOCS / "recipe.md").write_text(page(ARMS, runs))
    print(page(ARMS, runs))


if __name__ == "__main__":
    main()
