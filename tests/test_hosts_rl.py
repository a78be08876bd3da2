"""RL over three hosts that share nothing, made by benchmarks/hosts.py: weights cross them, and engine hosts are lost.

What each test of this file shows is said in docs/cluster.md. The hosts start once for all of them.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos_run import REWARD, save_policy
from hosts import Host, Hosts, cluster

from posttrain.files import read_jsonl
from posttrain.rl.history.audit import audit_stage

POSTTRAIN = str(Path(sys.executable).parent / "posttrain")
END_S = 150.0


def require_hosts() -> None:
    """Skip the test, with a warning, where hosts cannot be made. A skipped test has shown nothing."""
    try:
        with Hosts() as hosts:
            hosts.add("probe")
    except (OSError, RuntimeError) as error:
        message = f"NOT TESTED: hosts cannot be made of namespaces here: {error}"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)


LOOK_S = 0.1


@dataclass
class Cluster:
    """Three hosts with Ray: `home`, on which runs are started and which alone sees `folder`, and two for engines."""

    hosts: Hosts
    env: dict[str, str]
    folder: Path

    @property
    def home(self) -> Host:
        return self.hosts.all["home"]

    def start(self, name: str, *, on: str = "home", **changes: Any) -> subprocess.Popen:
        """Start an RL run. changes: keys of its config."""
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
            "resources": {"rollout": {"workers": 2, "nodes": ["left", "right"], "spread": True}},
            **changes,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        command = [POSTTRAIN, "rl", f"{name}.yaml", "--run-dir", name]
        log = self.folder / f"{name}.txt"
        return self.hosts.all[on].start(*command, env=self.env, log=log, cwd=str(self.folder))

    def stage(self, name: str) -> Path:
        """The folder of the stage of a run."""
        return next((self.folder / name).glob("**/ledger.sqlite")).parent

    def steps(self, name: str) -> list[dict[str, Any]]:
        """The metrics of a run's steps so far."""
        found = list((self.folder / name).glob("**/metrics.jsonl"))
        return list(read_jsonl(found[0])) if found else []

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a run."""
        return list(read_jsonl(self.folder / name / "events.jsonl"))

    def said(self, name: str) -> str:
        """What the command of a run printed."""
        return (self.folder / f"{name}.txt").read_text()

    def await_event(self, name: str, run: subprocess.Popen, event: str) -> None:
        """Wait until a run has written such an event."""
        end = time.monotonic() + END_S
        while all(line["event"] != event for line in self.events(name)):
            assert run.poll() is None, self.said(name)
            assert time.monotonic() < end, self.said(name)
            time.sleep(LOOK_S)

    def await_steps(self, name: str, run: subprocess.Popen, number: int) -> None:
        """Wait until a run has made so many steps."""
        end = time.monotonic() + END_S
        while len(self.steps(name)) < number and run.poll() is None and time.monotonic() < end:
            time.sleep(LOOK_S)
        assert len(self.steps(name)) >= number, self.said(name)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_hosts()
    folder = tmp_path_factory.mktemp("home")
    save_policy(folder / "policy")
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {"id": f"p{index}", "capability": "math", "messages": [{"role": "user", "content": f"sum {index}"}]}
        for index in range(24)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with cluster(folder, {"home": 1, "left": 2, "right": 2}) as (hosts, env):
        yield Cluster(hosts, env, folder)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_engine_hosts_that_are_cut_off_and_powered_off_are_survived(three):
    left, right = three.hosts.all["left"], three.hosts.all["right"]
    run = three.start("rl", steps=60)
    three.await_steps("rl", run, 4)

    right.cut()
    cut = time.time()
    three.await_event("rl", run, "engine_replaced")
    suspected = next(event for event in three.events("rl") if event["event"] == "engine_replaced")
    assert "does not answer" in suspected["reason"]
    assert suspected["t"] - cut < 30  # Ray itself takes a minute
    right.heal()
    end = time.monotonic() + END_S
    while any("EngineCore" in line for line in right.processes().values()):  # what was replaced is ended there
        assert time.monotonic() < end
        time.sleep(LOOK_S)

    three.await_steps("rl", run, len(three.steps("rl")) + 2)
    left.power_off()  # now all engines are lost at once
    assert run.wait(END_S) == 0, three.said("rl")
    assert [line["step"] for line in three.steps("rl")] == list(range(60))
    audit = audit_stage(three.stage("rl"))
    assert audit.is_clean, audit.problems
    assert audit.totals["engines_replaced"] >= 3
    assert not list(right.path("/dev/shm").glob("posttrain-weights-*"))
    end = time.monotonic() + END_S
    while any("EngineCore" in line for line in right.processes().values()):  # Ray ends the actors of a run that is over
        assert time.monotonic() < end
        time.sleep(LOOK_S)


@pytest.mark.full
def test_a_driver_needs_a_node_of_ray_on_its_host(three):
    three.hosts.add("bare", sees=[three.folder])
    run = three.start("bare", on="bare")
    assert run.wait(90) == 2
    assert "no node of Ray runs on this host (bare); start one that gives no CPUs away" in " ".join(
        three.said("bare").split()
    )


@pytest.mark.full
def test_a_host_or_a_label_that_the_cluster_lacks_is_named_before_anything_starts(three):
    for choice, message in (
        ({"nodes": ["nowhere"]}, "resources.rollout: nodes: got 'nowhere', which is no host of the cluster; it has"),
        ({"labels": {"gpu": "h100"}}, "resources.rollout: labels: no host has gpu=h100"),
    ):
        name = f"lacks-{next(iter(choice))}"
        run = three.start(name, resources={"rollout": choice})
        assert run.wait(90) == 2
        assert message in " ".join(three.said(name).split())
        assert not list((three.folder / name).glob("**/metrics.jsonl"))
