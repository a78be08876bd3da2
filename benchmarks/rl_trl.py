"""RL as a whole: the wall time of this package's stage and of TRL's GRPOTrainer until both reach the same accuracy.

    python benchmarks/rl_trl.py [--resume] [--races short,long] [--arms ours,in_turns,trl] [--seeds 0,1,2,3,4]
                                [--dir DIR] [--show]

  trl_speedup       race `short`: the quick start's puzzles, replies of at most 64 tokens, 256 a step
  trl_speedup_long  race `long`: puzzles with solutions of 16 to 512 tokens, lognormal (rl_trl_puzzles.py), 128 a step

Both sides train the same LlamaForCausalLM of a million parameters in fp32 from one base, which is trained once from
random weights and kept in $POSTTRAIN_CACHE. Both have the same prompts, scorer, replies a step, 8 for each prompt, and
learning rates of AdamW. A seed decides sampling and the order of prompts.

Both clocks start when the process of the side is launched: `posttrain rl rl.yaml`, or python or torchrun with
rl_trl_peer.py. Imports, engines and processes are in the time; `startup_s` says how much of it they are: until our
engines can sample, until TRL's training begins. Our run saves no policies; they are made afterwards, by a replay of its
recorded steps, which on a CPU gives the same weights; this is checked. TRL's clock stands while it saves policies.

Arms: ours; in_turns, ours with `max_staleness: 0`; trl. A greedy evaluation measures the policies of each on the same
held-out puzzles. The target of a seed is the accuracy of the base plus GAIN_SHARE of the largest gain of `ours`. The
time at which it was reached is interpolated between two policies. If a side has not reached it at its end, the time of
its last policy counts, and the ratio is a bound.

TRL's settings (rl_trl_races.py): each is tried on the machine of the benchmark, and the one that trains on the most
replies a second is used for all seeds. Results of earlier trials of `short`, on two cores that other programs used too
(load 4 to 15, so the figures are rough):

  one process of one thread               4.2 to 13 s a step of 256 replies
  one process of two threads              3.5 s; far slower if other programs use the cores
  two processes of one thread, gloo       2.3 s at load 3.5, 5.3 s at load 13
  static cache                            19 s for the first step at load 15; tried on each machine
  four steps on one generation            first generation of 1,024 replies in 52 s at load 10; tried on each machine
  continuous batching (transformers)      82 s for the first step: never the fastest
  use_vllm, colocate (vLLM 0.32 for CPUs) starts, then fails at its first weight update: "AttributeError: 'Parameter'
                                          object has no attribute 'weight_loader'"; vLLM packs its CPU layers once
                                          they are loaded, and load_weights alone cannot fill them again

Gradient checkpointing, bf16 and the KL penalty are off; the loss is TRL's default (dapo). Another learning rate was
not tried for TRL. Each training's result is written into benchmarks/results/rl_trl.json as soon as it is there
(resumable.py).
"""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from resumable import Results, chosen, folder_of, options
from rl_trl_races import OUR_ARMS, RACES, Race
from rl_trl_sides import curve, make_base, train_ours, train_peer

from posttrain.errors import StageError

RESULTS = Path(__file__).parent / "results" / "rl_trl.json"
GAIN_SHARE = 0.8  # the target is the base plus this share of the largest gain of ours
ARMS = (*OUR_ARMS, "trl")


def run_key(folder: Path, key: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Run a trial of a setting of TRL, short/trial/two_processes, or a training, short/ours/0."""
    name, arm, which = key.split("/")
    race, place = RACES[name], folder / key.replace("/", "-")
    base = make_base(folder / name, race)
    shutil.rmtree(place, ignore_errors=True)  # what a run that was cut off left
    if arm == "trial":
        return _trial(place, race, which, base=base)
    if arm in OUR_ARMS:
        found = train_ours(place, race, arm, base=base, seed=int(which))
    else:
        setting = race.peer_settings()[fastest(name, runs)]
        found = train_peer(place, race, setting, base=base, seed=int(which), seconds=race.peer_s)
    reached = curve(place / "eval", race, found.pop("points"), base=base)
    return {**{name: round(value, 2) for name, value in found.items()}, "curve": reached}


def _trial(place: Path, race: Race, setting: str, *, base: Any) -> dict[str, Any]:
    try:
        peer = train_peer(place, race, race.peer_settings()[setting], base=base, seed=0, seconds=race.trial_s)
    except StageError as error:
        return {"replies_per_s": 0.0, "error": str(error)[:500]}
    return {"replies_per_s": round(peer["replies_per_s"], 1), "steps": peer["steps"]}


def fastest(race: str, runs: Mapping[str, dict[str, Any]]) -> str:
    """The setting of TRL that trained on the most replies a second. Raises StageError if none ran."""
    trials = {key.split("/")[2]: run["replies_per_s"] for key, run in runs.items() if key.startswith(f"{race}/trial/")}
    best = max(trials, key=lambda name: trials[name], default="")
    if not best or not trials[best]:
        raise StageError(f"TRL ran with none of its settings in the race {race}")
    return best


def seconds_to(points: list[list[float]], accuracy: float) -> tuple[float, bool]:
    """Seconds until the accuracy was first reached, interpolated between two policies, and True; else all and False."""
    for (_, before_s, before), (_, after_s, after) in itertools.pairwise(points):
        if after >= accuracy:
            return before_s + (accuracy - before) / (after - before) * (after_s - before_s), True
    return points[-1][1], False


def compared(race: str, seed: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The target of a seed, and of each arm the seconds until then and whether it was reached; None without `ours`."""
    found = {arm: runs[f"{race}/{arm}/{seed}"] for arm in ARMS if f"{race}/{arm}/{seed}" in runs}
    if "ours" not in found:
        return None
    accuracies = [point[2] for point in found["ours"]["curve"]]
    target = accuracies[0] + GAIN_SHARE * (max(accuracies) - accuracies[0])
    return {"target": target, **{arm: seconds_to(run["curve"], target) for arm, run in found.items()}}


def table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: a line for each training, and for each race the median ratio over its seeds."""
    lines = [
        "| race, seed | arm | start-up | first step done | target reached | best accuracy | replies a second | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for race in RACES:
        ratios: dict[str, list[float]] = {}
        for seed in sorted({key.split("/")[2] for key in runs if key.startswith(f"{race}/ours/")}):
            line = compared(race, seed, runs)
            assert line is not None
            for arm in (arm for arm in ARMS if arm in line):
                run, (seconds, reached) = runs[f"{race}/{arm}/{seed}"], line[arm]
                ratio = seconds / line["ours"][0]
                ratios.setdefault(arm, []).append(ratio)
                best = max(point[2] for point in run["curve"])
                lines.append(
                    f"| {race} {seed} | {arm} | {run['startup_s']:.1f} s | {run['first_step_s']:.1f} s | "
                    f"{line['target']:.1%}: {'' if reached else '> '}{seconds:.1f} s | {best:.1%} | "
                    f"{run['replies_per_s']:.0f} | {'' if reached else '> '}{ratio:.2f} |"
                )
        for arm, values in ratios.items():
            if arm != "ours":
                lines.append(
                    f"| {race} | {arm} | | | | | | median {median(values):.2f}, {min(values):.2f} to "
                    f"{max(values):.2f}; goal of trl {RACES[race].goal} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__, races=",".join(RACES), arms=",".join(ARMS), seeds="0,1,2,3,4")
    arguments = parser.parse_args()
    races, arms = (chosen(parser, *given) for given in ((arguments.races, RACES), (arguments.arms, ARMS)))
    results = Results(RESULTS, keep=arguments.resume or arguments.show)
    keys = [f"{race}/trial/{name}" for race in races if "trl" in arms for name in RACES[race].peer_settings()]
    keys += [f"{race}/{arm}/{seed}" for race in races for seed in arguments.seeds.split(",") for arm in arms]
    if not arguments.show:
        with folder_of(arguments.dir) as folder:
            results.fill(
                keys,
                lambda key: run_key(Path(folder), key, results.runs),
                lambda run: f"{run['replies_per_s']} replies/s {run.get('curve', '')}",
            )
    print(table(results.runs))


if __name__ == "__main__":
    main()
