"""The quick start on three hosts that share nothing, while one of them is powered off. `make cluster-demo`; needs root.

    home    trains, and has the run directory       one, two    have the engines; `two` loses its power during RL

The hosts are made of namespaces of this machine (hosts.py). The quick start is cut short so that it takes minutes: the
base model trains 200 steps instead of 800, RL 16 instead of 36, and evaluations are greedy alone. So its accuracies are
below those of the quick start.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from hosts import cluster

from posttrain.files import read_jsonl
from posttrain.rl.history.audit import audit_stage

POSTTRAIN = str(Path(sys.executable).parent / "posttrain")
ENGINES = "[one, two]"
SHORT = [
    "base.steps=200",
    "rl.steps=16",
    "evaluate.samples=0",
    "rl.resources.rollout.workers=2",
    f"filter.resources.judge.nodes={ENGINES}",
    *(f"{stage}.resources.rollout.nodes={ENGINES}" for stage in ("rl", "evaluate")),
]
LOOK_S = 0.2
STEPS_BEFORE = 3
END_S = 1500.0


def demo(run_dir: Path) -> int:
    """Run it, and return the exit code of the command."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}.txt")
    log.unlink(missing_ok=True)
    print("starting three hosts, with Ray on each ...", flush=True)
    with cluster({"home": 2, "one": 1, "two": 1}, {"home": [run_dir]}, {}) as (hosts, env):
        command = [POSTTRAIN, "run", "quickstart", "--run-dir", str(run_dir), *SHORT]
        print("on home:", *command, flush=True)
        run = hosts.all["home"].start(*command, env=env, log=log)
        lost, shown, end = False, 0, time.monotonic() + END_S
        while run.poll() is None and time.monotonic() < end:
            if not lost and rl_steps(run_dir) >= STEPS_BEFORE:
                hosts.all["two"].power_off()
                lost = True
                print("--- the host `two` has lost its power ---", flush=True)
            text = log.read_text()
            print(text[shown:], end="", flush=True)
            shown = len(text)
            time.sleep(LOOK_S)
        print(log.read_text()[shown:], end="", flush=True)
        if run.poll() is None:
            run.kill()
        code = run.wait()
    return code or not lost or not tell(run_dir)


def rl_steps(run_dir: Path) -> int:
    """How many steps RL has made."""
    metrics = run_dir / "rl" / "metrics.jsonl"
    return len(list(read_jsonl(metrics))) if metrics.exists() else 0


def tell(run_dir: Path) -> bool:
    """What happened to the engines, and how good the policies are. Returns whether the audit of RL is clean."""
    for event in read_jsonl(run_dir / "events.jsonl"):
        if event["event"] in ("engine_replaced", "engine_unplaced"):
            print(event["time"], event["event"], event["name"], event.get("reason", ""))
    summary = json.loads((run_dir / "summary.json").read_text())
    print("status:", summary["status"], "  wall:", f"{summary['wall_s']:.0f} s")
    for stage, results in summary["eval"].items():
        print(f"  {stage:5} {results['all']['greedy']:.1%} of held-out puzzles right")
    audit = audit_stage(run_dir / "rl")
    print("audit:", "; ".join(audit.problems) or "clean: no group was lost or trained on twice")
    return audit.is_clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/cluster-demo"), help="is deleted first")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are ended too
    run_dir = arguments.run_dir.resolve()
    if run_dir.exists() and not (run_dir / "pipeline.yaml").exists() and any(run_dir.iterdir()):
        parser.error(f"--run-dir: {run_dir} holds something else than a run")
    shutil.rmtree(run_dir, ignore_errors=True)
    try:
        code = demo(run_dir)
    except RuntimeError as error:  # hosts cannot be made here
        parser.error(str(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
