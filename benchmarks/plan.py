"""How close forecasts of `posttrain plan --cluster --calibrate` come to what is measured.

    python benchmarks/plan.py runs/quickstart [--json FILE] [--only NAME,NAME] [--seed N] [--dir DIR]

One run of RL with the models and prompts of a finished quick start is calibrated from. Then six other settings are
forecast, all before the first of them is run, and run one after the other. For each: seconds of an optimizer step,
forecast and measured, after a third of the steps. All runs share the machine's cores; the load average is printed, for
other work makes the ratios meaningless. --dir keeps the runs and the forecasts: the same command goes on with what is
missing there, which must be in the same quiet hours.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from resumable import folder_of

from posttrain.cli.forecast import read_stage
from posttrain.files import read_jsonl
from posttrain.forecast.calibration import Calibration, calibrate, describe
from posttrain.forecast.config import ClusterConfig
from posttrain.forecast.outcome import simulate
from posttrain.forecast.read import find_device, find_models
from posttrain.forecast.setting import plan_asynchronous
from posttrain.resources import bundled
from posttrain.rl.config import RlConfig

CONFIG = bundled("configs", "quickstart/rl")
STEPS = 24
SKIPPED = STEPS // 3
SEEDS = 8
BASE = ("steps=24", "groups_per_step=16", "max_staleness=3", "selection.draw=in_turn", "optimizer.learning_rate=1e-7")
SETTINGS = {
    "calibration": (),
    "on_policy": ("max_staleness=0",),
    "one_stale": ("max_staleness=1",),
    "large_batch": ("groups_per_step=32",),
    "large_groups": ("group_size=16", "groups_per_step=8"),
    "small_groups": ("group_size=4", "groups_per_step=32", "max_staleness=2"),
    "two_engines": ("resources.rollout.workers=2", "resources.rollout.cpus=0.5", "max_staleness=2"),
}


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished quick start.")],
    *,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    only: Annotated[str, typer.Option(help="Names of settings; all are forecast.")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    directory: Annotated[Path | None, typer.Option("--dir", help="Keeps the runs and forecasts.")] = None,
) -> None:
    """Calibrate, forecast, measure, compare."""
    names = [name for name in SETTINGS if name != "calibration" and (not only or name in only.split(","))]
    with folder_of(directory) as folder:
        made = Path(folder)
        calibration = calibrate(_run(run, "calibration", made, seed=seed))
        print(f"costs: {describe(calibration)}", flush=True)
        written = made / "forecast.json"  # before any of them is measured
        expected: dict[str, float] = json.loads(written.read_text()) if written.exists() else {}
        expected |= {name: forecast_s(calibration, _config(run, name)) for name in names if name not in expected}
        written.write_text(json.dumps(expected))
        print(f"forecast, seconds a step: { {name: round(expected[name], 3) for name in names} }", flush=True)
        found: dict[str, Any] = {}
        for name in names:
            measured = measured_s(_run(run, name, made, seed=seed))
            found[name] = {"forecast_s": expected[name], "measured_s": measured, "ratio": expected[name] / measured}
            print(
                f"{name:<14} forecast {expected[name]:.3f} s, measured {measured:.3f} s, ratio "
                f"{expected[name] / measured:.2f}, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            result = {
                "costs": json.loads(describe(calibration)),
                "settings": found,
                "within_15_percent": sum(abs(item["ratio"] - 1) <= 0.15 for item in found.values()),
                "load": os.getloadavg()[0],
            }
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


def _overrides(run: Path, name: str) -> list[str]:
    inputs = (f"model.path={run / 'sft' / 'model'}", f"prompts.path={run / 'base' / 'data' / 'prompts.jsonl'}")
    return [*inputs, *BASE, *SETTINGS[name]]


def _config(run: Path, name: str) -> RlConfig:
    return read_stage(str(CONFIG), _overrides(run, name), "rl")


def _run(run: Path, name: str, made: Path, *, seed: int) -> Path:
    """Run the stage, unless it has been run. Returns the run directory."""
    if (made / name / "rl" / "DONE").exists():
        return made / name
    shutil.rmtree(made / name, ignore_errors=True)  # a run that was interrupted has a gap in its times
    command = [sys.executable, "-m", "posttrain.cli.main", "rl", str(CONFIG), *_overrides(run, name)]
    subprocess.run(
        [*command, "--run-dir", str(made / name), "--seed", str(seed)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return made / name


def measured_s(run_dir: Path) -> float:
    """Mean seconds of a step, after the first third."""
    lines: list[dict[str, Any]] = list(read_jsonl(run_dir / "rl" / "metrics.jsonl"))
    return (lines[-1]["t"] - lines[SKIPPED]["t"]) / (len(lines) - 1 - SKIPPED)


def forecast_s(calibration: Calibration, config: RlConfig) -> float:
    """The same from the simulation."""
    cluster = ClusterConfig(device="cpu", hosts=1, devices_per_host=64)
    planned = plan_asynchronous(config, cluster, find_device(cluster), models=find_models(config, cluster))
    setting = calibration.apply(planned, config).setting
    traces = [simulate(setting, steps=STEPS + 1, seed=seed).trace for seed in range(SEEDS)]
    ends = [[step.ended for step in trace.steps[:STEPS]] for trace in traces]
    return sum((end[-1] - end[SKIPPED]) / (STEPS - 1 - SKIPPED) for end in ends) / SEEDS


if __name__ == "__main__":
    typer.run(main)
