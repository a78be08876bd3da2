"""RL whose engines join and leave, from a bad start, against every fixed number of engines.

    python benchmarks/elastic.py [--resume] [--arms fixed-1,...,elastic,auto] [--seeds 0] [--dir DIR] [--show]

fixed-N    N engines
elastic    workers: {min: 1, max: 6}: begins with one, and what steps measure decides
auto       the same with `forecast: true`: after the first steps a forecast chooses

Each step of an engine begins with a sleep of SLEEP_S (slow_engine.py), so that one to six engines really scale on two
cores. The trainer is as it is. An arm is one RL run of a random model of a million parameters. Its throughput is that
of its last steps, in tokens trained on a second: steps come in bursts, so of 24 of them, of fixed-1, which is slow and
even, of 12. elastic and auto make many more before, since they have to find their number first. In the end a table
shows each arm beside the best fixed number. Goal: at least 0.85 of it.

The result of each arm and seed is written into benchmarks/results/elastic.json as soon as it is there (resumable.py
says what the options do). The forecast of `auto` is told that there are CPUS cores, which is what sleeping engines need
no more than.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from resumable import run_arms
from rl_models import save
from slow_engine import install

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.forecast.engines import choose_for_run
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.scaling import Choice

RESULTS = Path(__file__).parent / "results" / "elastic.json"
SLEEP_S = 0.03
FIXED = (1, 2, 3, 4, 5, 6)
CPUS = 8.0
RANGE = {"min": FIXED[0], "max": FIXED[-1]}
MEASURED = 24
STEPS, MORE_STEPS = 2 * MEASURED, 150
WORKERS: dict[str, Any] = {
    **{f"fixed-{number}": number for number in FIXED},
    "elastic": RANGE,
    "auto": {**RANGE, "forecast": True},
}
SETTINGS: dict[str, Any] = {
    "reward": {"name": f"{Path(__file__).with_name('rl_reward.py')}:every_second"},
    "groups_per_step": 4, "group_size": 4, "max_staleness": 3, "sampling": {"max_tokens": 64},
    "optimizer": {"learning_rate": 1e-6}, "checkpoint_every": MORE_STEPS,
    "engine": {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.05},
}  # fmt: skip


def run_arm(scratch: Path, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm."""
    from posttrain.rl.stage import run

    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        install(folder / "plugin", SLEEP_S)
        rows = [{"id": f"r{index}", "messages": [{"role": "user", "content": f"{index} + 1"}]} for index in range(64)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = save("1m", folder / "model").path
        data = {
            **SETTINGS, "model": {"path": model, "dtype": "float32"},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "steps": _steps(arm),
            "resources": {"rollout": {"workers": WORKERS[arm], "cpus": 0.25}, "trainer": {"cpus": 0.25}},
        }  # fmt: skip
        stage = folder / "rl"
        stage.mkdir()
        context = StageContext("rl", stage, folder / "events.jsonl", seed)
        with ray_session():
            run(validate_config(RlConfig, data, "benchmark"), context, _choose)
        return _figures(folder, min(MEASURED, _steps(arm) // 2))


def _steps(arm: str) -> int:
    if not arm.startswith("fixed"):
        return MORE_STEPS
    return STEPS if arm != "fixed-1" else STEPS // 2


def _choose(config: RlConfig, stage: Path, most: int, *, cpus: float) -> Choice:
    return choose_for_run(config, stage, most, cpus=max(cpus, CPUS))


def _figures(folder: Path, measured: int) -> dict[str, Any]:
    steps = list(read_jsonl(folder / "rl" / "metrics.jsonl"))
    late = steps[-measured - 1 :]
    wanted = ("engines_wanted", "engines_limited", "engines_forecast", "engines_not_forecast", "engine_refused")
    events = [event for event in read_jsonl(folder / "events.jsonl") if event["event"] in wanted]
    seconds = late[-1]["t"] - late[0]["t"]
    return {
        "tokens_per_s": sum(step["tokens_trained"] for step in late[1:]) / seconds,
        "step_s": seconds / (len(late) - 1),
        "engines": [step["engines"] for step in steps if "engines" in step],
        "decisions": [{"t": event["t"] - steps[0]["t"], **_without(event)} for event in events],
    }


def _without(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("t", "time", "stage")}


def main() -> None:
    def shown(result: Any) -> str:
        return f"{result['tokens_per_s']:.0f} tokens/s, a step {result['step_s']:.2f} s, load {result['load']}"

    runs = run_arms(__doc__, RESULTS, WORKERS, run=run_arm, shown=shown)
    for seed in sorted({key.partition("/")[2] for key in runs}):
        mine = {arm: runs[f"{arm}/{seed}"] for arm in WORKERS if f"{arm}/{seed}" in runs}
        best = max((run["tokens_per_s"] for arm, run in mine.items() if arm.startswith("fixed")), default=0.0)
        print(f"seed {seed}: tokens/s, share of the best fixed number, engines in the end")
        for arm, run in mine.items():
            share = f"{run['tokens_per_s'] / best:5.2f}" if best else "    -"
            engines = run["engines"][-1] if run["engines"] else arm.partition("-")[2]
            print(f"  {arm:<8} {run['tokens_per_s']:8.0f} {share}   {engines}")


if __name__ == "__main__":
    main()
