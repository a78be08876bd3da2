"""Kills and freezes the processes of RL runs, in every state of their groups, and checks that nothing is lost.

python benchmarks/chaos.py [--kills N] [--seed S] [--json FILE] [--only VICTIM[:SIGNAL][,...]]
python benchmarks/chaos.py --hosts [--kills N] [--resume] ...   faults of hosts and networks (chaos_hosts.py; as root)

Faults are spread evenly over processes, signals and states of groups. Each run gets up to three faults, and every third
run is deterministic. After the last step a run is audited, and its weights are compared bit for bit: those of an
asynchronous run with its replay from the archive, those of a deterministic run with an undisturbed run. Every wait has
a deadline.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from chaos_hosts import FAULTS, faults_left, host_chaos, take_batch
from chaos_hosts import summary as hosts_summary
from chaos_run import STATES, VICTIMS, ChaosRun, Ended, Late, Strike, as_json, save_policy, write_stage
from measure import machine

from posttrain.pipeline.summary import versions

KILLS_A_RUN = 3
STEPS = 10 + 6 * KILLS_A_RUN
STRIKE_S = 150.0
FINISH_S = 300.0
FROZEN = ("engine_core", "rollout_actor", "reward_process", "reward_actor", "trainer_rank")
PAIRS = [(name, "kill") for name in VICTIMS] + [(name, "stop") for name in FROZEN]
DETERMINISTIC = {"deterministic": True, "max_staleness": 0}


def plan(only: set[str], random: Random) -> Iterator[Strike]:
    """An endless list of faults. Each round has every victim and signal once, and each time in another state."""
    pairs = [pair for pair in PAIRS if not only or only & {pair[0], ":".join(pair)}]
    turn = 0
    while True:
        for index in random.sample(range(len(pairs)), len(pairs)):
            yield Strike(*pairs[index], STATES[(index + turn) % len(STATES)])
        turn += 1


def chaos(
    scratch: Path, model: Path, number: int, *, strikes: list[Strike], reference: Path, seed: int
) -> dict[str, Any]:
    """Do one run with its faults, and return what the results file says about it."""
    from posttrain.rl.history.audit import audit_stage
    from posttrain.rl.history.replay import weight_gaps

    is_deterministic = number % 3 == 2
    changes = DETERMINISTIC if is_deterministic else {"trainer_restarts": number % 2}
    folder = write_stage(scratch / f"run{number}", model, STEPS, seed=seed, **changes)
    run = ChaosRun(folder, Random(seed * 1000 + number))
    found: dict[str, Any] = {"run": number, "deterministic": is_deterministic, **changes, "kills": [], "not_sent": []}
    try:
        run.start()
        for strike in strikes:
            try:
                found["kills"].append(run.strike(strike, STRIKE_S))
                tell(number, strike)
            except (Ended, Late) as reason:
                found["not_sent"].append([strike.victim, strike.signal, strike.state, type(reason).__name__])
        for _ in range(3):  # a run that ended by itself is a defect, but a finished run shows more about it
            found["exit_code"] = run.finish(FINISH_S)
            if found["exit_code"] in (0, None):
                break
            run.start()
        found["hung_at_end"] = found["exit_code"] is None
        found["orphans"] = run.orphans() if not found["hung_at_end"] else []
        found["lives"] = run.lives
        if found["exit_code"] == 0:
            audit = audit_stage(folder)
            found |= {"totals": audit.totals, "problems": audit.problems}
            if is_deterministic:
                found["largest_gap"] = max(weight_gaps(reference, folder / "model").values(), default=0.0)
                found["weights_equal"] = not weight_gaps(reference, folder / "model")
            else:
                replayed = run.replay(FINISH_S)
                found["weights_equal"] = replayed["weights_equal"]
                found["batches_equal"] = replayed.get("batches_equal")
    finally:
        run.close()
    return found


def undisturbed(scratch: Path, model: Path, seed: int) -> Path:
    """The weights of a deterministic run that gets no faults."""
    folder = write_stage(scratch / "undisturbed", model, STEPS, seed=seed, **DETERMINISTIC)
    run = ChaosRun(folder, Random(0))
    try:
        run.start()
        if run.finish(FINISH_S) != 0:
            raise SystemExit(
                f"the undisturbed run did not finish:\n{(scratch / 'undisturbed.log').read_text()[-3000:]}"
            )
    finally:
        run.close()
    return folder / "model"


def tell(number: int, strike: Strike) -> None:
    counts = " ".join(f"{name} {count}" for name, count in sorted(strike.counts.items()))
    seconds = f"{strike.seconds:6.1f} s" + (f" + {strike.resumed_s:.1f} s" if strike.resumed_s is not None else "")
    place = f"{number:4} {strike.victim:14} {strike.signal:4} at {strike.state:9}"
    print(
        f"{place} {strike.outcome:8} {seconds}  {counts}",
        *(f"\n     left: {name}" for name in strike.orphans),
        flush=True,
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all runs."""
    kills = [strike for run in runs for strike in run["kills"]]
    return {
        "kills": len(kills),
        "runs": len(runs),
        "survived": sum(strike.outcome == "survived" for strike in kills),
        "resumed": sum(strike.outcome == "resumed" for strike in kills),
        "hung": sum(strike.outcome == "hung" for strike in kills) + sum(run["hung_at_end"] for run in runs),
        "failed": sum(strike.outcome == "failed" for strike in kills)
        + sum(run["exit_code"] not in (0, None) for run in runs),
        "lost": sum(run.get("totals", {}).get("lost", 0) for run in runs),
        "trained_twice": sum(run.get("totals", {}).get("trained_twice", 0) for run in runs),
        "orphans": sum(len(strike.orphans) for strike in kills) + sum(len(run["orphans"]) for run in runs),
        "audits_clean": all(run.get("problems") == [] for run in runs),
        "weights_equal": all(run.get("weights_equal") for run in runs),
        "slowest_s": max((strike.seconds for strike in kills), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="victims, or VICTIM:SIGNAL, comma-separated")
    parser.add_argument("--hosts", action="store_true", help="faults of hosts and networks instead of processes")
    parser.add_argument("--resume", action="store_true", help="with --hosts: keep the runs of the file --json")
    arguments = parser.parse_args()
    only = {name for name in arguments.only.split(",") if name}
    pairs = FAULTS if arguments.hosts else [":".join(pair) for pair in PAIRS]
    known = {*pairs, *(pair.partition(":")[0] for pair in pairs)}
    if arguments.resume and not (arguments.hosts and arguments.json):
        parser.error("--resume: goes with --hosts and --json FILE")
    if only - known:
        parser.error(f"--only: no victim {', '.join(sorted(only - known))}; there are: {', '.join(sorted(known))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running run is ended too
    if arguments.hosts:
        hosts_main(arguments, only)
        return
    began = time.time()
    strikes = plan(only, Random(arguments.seed))
    runs: list[dict[str, Any]] = []
    sent, waiting = 0, []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = save_policy(scratch / "policy")
        reference = undisturbed(scratch, model, arguments.seed) if arguments.kills > 2 * KILLS_A_RUN else scratch
        while sent < arguments.kills and len(runs) < 2 * arguments.kills:
            wanted = min(KILLS_A_RUN, arguments.kills - sent)
            mine = [replace(strike) for strike in [*waiting, *islice(strikes, wanted - len(waiting))]]
            runs.append(chaos(scratch, model, len(runs), strikes=mine, reference=reference, seed=arguments.seed))
            run = runs[-1]
            sent += len(run["kills"])
            waiting = [Strike(*missed[:3]) for missed in run["not_sent"]][:KILLS_A_RUN]
            verdict = f"clean {run.get('problems') == []}, weights equal {run.get('weights_equal')}"
            print(
                f"{run['run']:4} {run['lives']} lives, {verdict}", *run.get("problems", []), *run["orphans"], flush=True
            )
            report = report_of(arguments, runs, began)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("  ".join(f"{name} {value}" for name, value in summary(runs).items()))


def hosts_main(arguments: argparse.Namespace, only: set[str]) -> None:
    """Faults of hosts, in runs of their own. Each run is in the results file as soon as it is over."""
    runs: list[dict[str, Any]] = []
    if arguments.resume and arguments.json.exists():
        runs = json.loads(arguments.json.read_text())["per_run"]
    waiting = faults_left(arguments.kills, only, Random(arguments.seed), runs=runs)
    while waiting and len(runs) < arguments.kills:
        faults = take_batch(waiting)
        run = host_chaos(faults, arguments.seed + len(runs))
        runs.append({**run, "load": os.getloadavg()[0], "date": datetime.now(UTC).isoformat(timespec="seconds")})
        waiting += run["not_sent"]
        print(
            f"run {len(runs)}: exit code {run['exit_code']}, problems {run['problems']}, left {run['left']}", flush=True
        )
        if arguments.json:
            settings = {"kills": arguments.kills, "seed": arguments.seed, "only": arguments.only}
            report = {
                "machine": machine(), "versions": versions(), "settings": settings, **hosts_summary(runs),
                "per_run": runs,
            }  # fmt: skip
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("  ".join(f"{name} {value}" for name, value in hosts_summary(runs).items()))


def report_of(arguments: argparse.Namespace, runs: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """The content of the results file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": {"kills": arguments.kills, "seed": arguments.seed, "only": arguments.only, "steps": STEPS},
        "wall_s": round(time.time() - began, 1),
        **summary(runs),
        "per_run": [{**run, "kills": [as_json(strike) for strike in run["kills"]]} for run in runs],
    }


if __name__ == "__main__":
    main()
