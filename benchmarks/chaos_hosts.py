"""Faults of hosts and of their network for RL runs over hosts (hosts_run.py); `chaos.py --hosts` runs them.

    engine  cut 5, 30 or 90 s, off, leave, slow     the host of an engine; another one joins after `off` and `leave`
    judge   the same                                the host of the judge's engine, the only one; another one joins also
                                                    when it is cut off for as long as Ray takes to give a host up
    trainer the same                                the host of the trainer's rank, as the judge's
    home    cut 5, 30 or 90 s, off                  the host of driver, rewards and ledger
    join                                            a host for engines

A run has a judge, or its trainer on a host of its own, if one of its faults is of that.

A cut is silent: packets are dropped and nobody is told. After each fault the run must make steps again, by itself or
continued on another host from its copy (`posttrain run --resume URI`). Then it is audited, and processes and shared
memory that it left on any host are listed.
"""

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from chaos_run import Late
from hosts import Host
from hosts_run import ENGINES, QUICK_HEALTH, Cluster, Ended, Run, await_nothing_left, left_on, running

OTHERS = ("judge", "trainer")  # roles of which a run has a host if its faults need it
FAULTS = {
    **{f"{role}:cut{seconds}": 20 + 2 * seconds for role in ("engine", *OTHERS) for seconds in (5, 30, 90)},
    **{f"{role}:{what}": steps for role in ("engine", *OTHERS) for what, steps in
       {"off": 60, "leave": 60, "slow": 30}.items()},
    "join": 20,
    **{f"home:cut{seconds}": 20 for seconds in (5, 30, 90)},
    "home:off": 20,
}  # fmt: skip
"""Each fault, and the steps that a run makes on a quiet machine until it is over: at most three in two seconds."""
LAST = {"home:cut5", "home:cut30", "home:cut90", "home:off"}  # after these a run may go on elsewhere
REWARDS = {"workers": 1, "timeout_s": 3}
JUDGE = {
    "model": {"path": "policy", "dtype": "float32"}, "template": "Rate: {prompt} {response}",
    "labels": ["easy", "medium", "hard"], "engine": {"max_model_len": 256, "kv_cache_gib": 0.1},
}  # fmt: skip
GIVEN_UP_S = 30.0  # of silence, after which Ray may end a host's node for good
SLOW_RATE = "20mbit"
SLOW_S = 20.0
BEFORE, AFTER = 4, 3  # steps before the first fault, and after each
FAULTS_A_RUN = 3
START_S = 480.0
STRIKE_S = 240.0
FINISH_S = 420.0


@dataclass
class HostStrike:
    """One fault and its outcome. step: the last one before it. seconds: until AFTER more steps were made after its end.

    outcome: survived, resumed (exit_code: of the run that ended; resumed_s: until the other made steps) or failed.
    """

    fault: str
    step: int = 0
    outcome: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    resumed_s: float | None = None
    note: str = ""


@dataclass
class HostRun:
    """One RL run with its faults. number: makes the names of hosts that join."""

    cluster: Cluster
    random: Random
    strikes: list[HostStrike]
    number: int = 0
    at: list[Run] = field(default_factory=list)  # the run, and what continued it

    def start(self) -> None:
        steps = BEFORE + 20 + sum(FAULTS[strike.fault] for strike in self.strikes)
        roles = roles_of([strike.fault for strike in self.strikes])
        resources: dict[str, Any] = {"rollout": {"workers": 2, **ENGINES}}
        changes: dict[str, Any] = {}
        if "judge" in roles:
            resources["judge"] = {"labels": {"role": "judge"}}
            changes |= {"judge": JUDGE, "reward": {**REWARDS, "name": "judged"}}
        if "trainer" in roles:
            resources["trainer"] = {"labels": {"role": "trainer"}}
            changes["trainer_restarts"] = len(self.strikes)
        run = self.cluster.start("chaos", storage=True, steps=steps, resources=resources, **changes)
        self.at.append(run)
        run.await_steps(BEFORE, START_S)

    def strike(self, strike: HostStrike) -> None:
        """Make one fault, and wait until the run has got over it. Raises Late if the run is over already."""
        run = self.at[-1]
        if run.process.poll() is not None:
            raise Late
        strike.step, began = len(run.steps()), time.monotonic()
        kind, _, what = strike.fault.partition(":")
        try:
            if kind == "join":
                self._joined("engine")
            elif kind == "home":
                self._home(what)
            else:
                self._other(self._victim(kind), what, kind)
            made = len(run.steps())
            run.until(lambda: len(run.steps()) >= made + AFTER or run.process.poll() == 0, STRIKE_S)
            strike.outcome = "survived"
        except Ended as error:
            strike.outcome, strike.note, strike.exit_code = "failed", str(error)[-300:], run.process.poll()
        strike.seconds = round(time.monotonic() - began, 1)
        if strike.outcome == "failed" and strike.fault in LAST:
            self._resume(run, strike)

    def _resume(self, run: Run, strike: HostStrike) -> None:
        began, made = time.monotonic(), len(run.steps())
        again = self.cluster.resume(run, "spare")
        self.at.append(again)
        try:
            again.until(lambda: len(again.steps()) >= made + AFTER or again.process.poll() == 0, STRIKE_S)
            strike.outcome = "resumed"
        except Ended as error:
            strike.note = str(error)[-300:]
        strike.resumed_s = round(time.monotonic() - began, 1)

    def _victim(self, role: str) -> Host:
        hosts = self.cluster.of_role(role)
        return self.random.choice([host for host in hosts if left_on(host)] or hosts)

    def _joined(self, role: str) -> Host:
        self.number += 1
        return self.cluster.join(f"late{self.number}", role=role)

    def _other(self, host: Host, what: str, role: str) -> None:
        if what.startswith("cut"):
            seconds = float(what.removeprefix("cut"))
            host.cut()
            if role in OTHERS and seconds >= GIVEN_UP_S:
                self._joined(role)
            time.sleep(seconds)
            host.heal()
        elif what == "slow":
            host.slow(SLOW_RATE)
            time.sleep(SLOW_S)
            host.slow("10gbit")
        elif what == "off":
            host.power_off()
            self._joined(role)
        else:
            host.leave()
            host.power_off()
            self._joined(role)

    def _home(self, what: str) -> None:
        run, home = self.at[-1], self.cluster.home
        # What is to be continued must be in the store, as in every run that is longer than a few checkpoints.
        run.until(lambda: bool(list(run.folder.glob("**/checkpoints/step_*"))), STRIKE_S)
        time.sleep(3.0)
        if what == "off":
            home.power_off()
            raise Ended("its host was powered off")
        home.cut()
        time.sleep(float(what.removeprefix("cut")))
        home.heal()

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the run, and say what it left."""
        from posttrain.rl.history.audit import audit_stage

        run = self.at[-1]
        found: dict[str, Any] = {"exit_code": None, "problems": None, "left": []}
        try:
            found["exit_code"] = run.wait(FINISH_S)
        except Ended as error:
            run.process.send_signal(signal.SIGKILL)
            found["said"] = str(error)[-500:]
        if found["exit_code"] == 0:
            # A host's files are reached through /proc, where SQLite opens none.
            with tempfile.TemporaryDirectory() as folder:
                audit = audit_stage(Path(shutil.copytree(run.stage, Path(folder) / "rl")))
            found |= {"totals": audit.totals, "problems": audit.problems}
        elif found["exit_code"] is not None:
            found["said"] = run.said()[-500:]
        for name, host in self.cluster.hosts.all.items():
            if host.is_on:
                found["left"] += [f"{name}: {line}" for line in await_nothing_left(host, 60)]
        return found


def roles_of(faults: list[str]) -> list[str]:
    """The roles of which a run with these faults needs a host."""
    return [role for role in OTHERS if any(fault.startswith(f"{role}:") for fault in faults)]


def plan(only: set[str], random: Random) -> Iterator[str]:
    """An endless list of faults, each once in a round."""
    faults = [fault for fault in FAULTS if not only or only & {fault, fault.partition(":")[0]}]
    while True:
        yield from random.sample(faults, len(faults))


def host_chaos(faults: list[str], seed: int) -> dict[str, Any]:
    """One cluster and one run on it, which gets these faults; those after which it may go on elsewhere come last."""
    strikes = [HostStrike(fault) for fault in sorted(faults, key=lambda fault: fault in LAST)]
    scratch = Path(tempfile.mkdtemp(prefix="posttrain-hosts-"))
    found: dict[str, Any] = {"seed": seed, "faults": faults, "kills": [], "not_sent": []}
    try:
        others = {f"{role}1": role for role in roles_of(faults)}
        with running(scratch, {"left": 2, "right": 2}, [QUICK_HEALTH], others=others) as cluster:
            run = HostRun(cluster, Random(seed), strikes)
            run.start()
            for strike in strikes:
                try:
                    run.strike(strike)
                    found["kills"].append(vars(strike))
                    print(
                        f"{strike.fault:13} at step {strike.step:3} {strike.outcome:8} {strike.seconds:6.1f} s"
                        + (f" + {strike.resumed_s} s" if strike.resumed_s else "")
                        + f"  {strike.note}",
                        flush=True,
                    )
                except Late:
                    found["not_sent"].append(strike.fault)
                if strike.outcome in ("failed", "resumed"):
                    found["not_sent"] += [left.fault for left in strikes[strikes.index(strike) + 1 :]]
                    break
            found |= run.finish()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def faults_left(number: int, only: set[str], random: Random, *, runs: list[dict[str, Any]]) -> list[str]:
    """The faults of a plan that these runs have not had."""
    waiting = list(islice(plan(only, random), number))
    for strike in (strike for run in runs for strike in run["kills"]):
        if strike["fault"] in waiting:
            waiting.remove(strike["fault"])
    return waiting


def take_batch(waiting: list[str]) -> list[str]:
    """Take the faults of the next run: up to three, and at most one after which the run may go on elsewhere."""
    taken: list[str] = []
    for fault in waiting:
        if len(taken) < FAULTS_A_RUN and not (fault in LAST and any(other in LAST for other in taken)):
            taken.append(fault)
    for fault in taken:
        waiting.remove(fault)
    return taken


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all runs."""
    strikes = [strike for run in runs for strike in run["kills"]]
    return {
        "faults": len(strikes),
        "runs": len(runs),
        "survived": sum(strike["outcome"] == "survived" for strike in strikes),
        "resumed": sum(strike["outcome"] == "resumed" for strike in strikes),
        "failed": sum(strike["outcome"] == "failed" for strike in strikes) + sum(run["exit_code"] != 0 for run in runs),
        "lost": sum(run.get("totals", {}).get("lost", 0) for run in runs),
        "trained_twice": sum(run.get("totals", {}).get("trained_twice", 0) for run in runs),
        "left": sum(len(run["left"]) for run in runs),
        "audits_clean": all(run["problems"] == [] for run in runs),
        "slowest_s": max((strike["seconds"] + (strike["resumed_s"] or 0) for strike in strikes), default=0.0),
    }
