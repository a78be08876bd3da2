"""Runs on a cluster whose hosts are made of namespaces (hosts.py), as tests, demo and chaos.py start and watch them.

head     Ray's head, which gives no CPUs away
home     on which runs are started; one CPU, for the trainer
spare    on which a run can be continued; one CPU. Both see `store`, and `home` alone sees `folder`
others   hosts for engines, the judge or the trainer, with the label `role=engine` and so on
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from chaos_run import REWARD, save_policy
from hosts import Host, Hosts, cluster

from posttrain.files import read_jsonl

POSTTRAIN = str(Path(sys.executable).parent / "posttrain")
END_S = 200.0
LOOK_S = 0.1
ENGINE = "engine"  # the role of a host, which it has as a label
ENGINES = {"labels": {"role": ENGINE}, "spread": True}
OURS = ("EngineCore", "ray::EngineActor", "ray::Rank")  # in the command lines of a run's processes on other hosts
# With these Ray itself finds a silent host within 9 to 12 s instead of a minute.
QUICK_HEALTH = (
    '--system-config={"health_check_initial_delay_ms":1000,"health_check_period_ms":1000,'
    '"health_check_timeout_ms":2000,"health_check_failure_threshold":3}'
)


class Ended(Exception):
    """The run has ended, or did not do in time what it was waited for."""


@dataclass
class Cluster:
    """The hosts. env: the variables with which a driver joins the cluster. roles: of hosts, by their names."""

    hosts: Hosts
    env: dict[str, str]
    folder: Path
    store: Path
    roles: dict[str, str]

    @property
    def home(self) -> Host:
        return self.hosts.all["home"]

    def join(self, name: str, num_cpus: int = 2, role: str = ENGINE) -> Host:
        """Have another host join."""
        host = self.hosts.add(name)
        self.roles[name] = role
        host.ray(self.env["RAY_AUTH_TOKEN"], self.hosts.all["head"], num_cpus=num_cpus, labels={"role": role})
        return host

    def of_role(self, role: str) -> list[Host]:
        """The hosts of a role that are on."""
        return [host for name, host in self.hosts.all.items() if host.is_on and self.roles.get(name) == role]

    def start(self, name: str, *, on: str = "home", storage: bool = False, **changes: Any) -> "Run":
        """Start an RL run. storage: whether it is copied to `store`. changes: keys of its config."""
        config = {
            "model": {"path": "policy", "dtype": "float32"},
            "prompts": {"path": "prompts.jsonl"},
            "reward": {"name": "reward.py:even_share", "workers": 1, "timeout_s": 3},
            "steps": 12,
            "groups_per_step": 4,
            "group_size": 4,
            "max_staleness": 2,
            "sampling": {"max_tokens": 64},
            "optimizer": {"learning_rate": 1e-4},
            "engine": {"max_model_len": 256, "kv_cache_gib": 0.1, "stream_interval": 8},
            "checkpoint_every": 5,
            "resources": {"rollout": {"workers": 2, **ENGINES}},
            **changes,
        }
        return self.start_stage(name, "rl", config, on=on, storage=storage)

    def start_stage(
        self, name: str, kind: str, config: dict[str, Any], *, on: str = "home", storage: bool = False
    ) -> "Run":
        """Start a run of one stage. kind: of the stage. storage: as for `start`."""
        command = [kind, f"{name}.yaml"]
        if storage:
            stage = {"name": kind, "kind": kind, "config": config}
            config = {"name": name, "storage": str(self.store / name), "stages": [stage]}
            command = ["run", f"{name}.yaml"]
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run = Run(self, name, on, folder=self.folder / name)
        run.process = self._launch(on, name, *command, "--run-dir", name, cwd=self.folder)
        return run

    def resume(self, run: "Run", on: str) -> "Run":
        """Continue a run from the store on another host, in a directory of that host alone."""
        again = Run(self, run.name, on, folder=self.hosts.all[on].path(f"/tmp/{run.name}"))
        uri = str(self.store / run.name)
        again.process = self._launch(on, run.name, "run", "--resume", uri, "--run-dir", f"/tmp/{run.name}")
        return again

    def _launch(self, on: str, name: str, *command: str, cwd: Path = Path("/tmp")) -> "subprocess.Popen[bytes]":
        log = self.folder / f"{name}.txt"
        return self.hosts.all[on].start(POSTTRAIN, *command, env=self.env, log=log, cwd=str(cwd))


class Run:
    """One run on a host. folder: its run directory, as it is reached from here."""

    process: "subprocess.Popen[bytes]"

    def __init__(self, cluster: Cluster, name: str, on: str, *, folder: Path):
        self.cluster = cluster
        self.name = name
        self.on = on
        self.folder = folder

    @property
    def stage(self) -> Path:
        """The folder of the stage."""
        return next(self.folder.glob("**/ledger.sqlite")).parent

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of the steps so far."""
        found = list(self.folder.glob("**/metrics.jsonl"))
        return list(read_jsonl(found[0])) if found else []

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The events so far, or those with a name."""
        file = self.folder / "events.jsonl"
        return [line for line in read_jsonl(file) if name in ("", line["event"])] if file.exists() else []

    def said(self) -> str:
        """What the command printed, in one line."""
        return " ".join((self.cluster.folder / f"{self.name}.txt").read_text().split())

    def until(self, condition: Callable[[], bool], deadline_s: float = END_S) -> None:
        """Wait until a condition holds. Raises Ended if the run ends before, or that takes too long."""
        end = time.monotonic() + deadline_s
        while not condition():
            if self.process.poll() is not None and not condition():
                raise Ended(f"exit code {self.process.returncode}: {self.said()}")
            if time.monotonic() > end:
                raise Ended(f"not within {deadline_s:g} s: {self.said()}")
            time.sleep(LOOK_S)

    def await_steps(self, number: int, deadline_s: float = END_S) -> None:
        """Wait until so many steps are made."""
        self.until(lambda: len(self.steps()) >= number, deadline_s)

    def await_event(self, name: str, number: int = 1) -> None:
        """Wait until so many events with a name are written."""
        self.until(lambda: len(self.events(name)) >= number)

    def wait(self, deadline_s: float = END_S) -> int:
        """The exit code. Raises Ended if the command does not end in time."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise Ended(f"did not end within {deadline_s:g} s: {self.said()}") from None


def left_on(host: Host) -> list[str]:
    """Processes of engines and ranks, and segments of weights, on a host."""
    processes = [line for line in host.processes().values() if any(name in line for name in OURS)]
    return processes + [str(path) for path in host.path("/dev/shm").glob("posttrain-weights-*")]


def await_nothing_left(host: Host, deadline_s: float = END_S) -> list[str]:
    """What is still on a host when nothing is, or the deadline is over."""
    end = time.monotonic() + deadline_s
    while (left := left_on(host)) and time.monotonic() < end:
        time.sleep(LOOK_S)
    return left


@contextlib.contextmanager
def running(
    scratch: Path,
    engines: Mapping[str, int],
    options: Sequence[str] = (),
    *,
    home_cpus: int = 1,
    others: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A cluster with hosts for engines: their names, and the CPUs that they give away. scratch: an empty folder.

    others: more hosts, of two CPUs each, and their roles.
    """
    folder, store = scratch / "home", scratch / "store"
    folder.mkdir()
    store.mkdir()
    save_policy(folder / "policy")
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {"id": f"p{index}", "capability": "math", "messages": [{"role": "user", "content": f"sum {index}"}]}
        for index in range(24)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sees = {"home": [folder, store], "spare": [store]}
    roles = {**dict.fromkeys(engines, ENGINE), **(others or {})}
    num_cpus = {"head": 0, "home": home_cpus, "spare": 1, **engines, **dict.fromkeys(others or {}, 2)}
    labels = {name: {"role": role} for name, role in roles.items()}
    with cluster(num_cpus, sees, labels, options=options) as (hosts, env):
        yield Cluster(hosts, env, folder, store, roles)
