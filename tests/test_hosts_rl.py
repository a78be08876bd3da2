"""RL over hosts that share nothing, made by benchmarks/hosts.py: weights cross them, and hosts of all kinds are lost.

What each test of this file shows is said in docs/cluster.md. The hosts start once for all of them, and the later tests
have those that the earlier ones have left.
"""

import dataclasses
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts
from hosts_run import Cluster, await_nothing_left, left_on, running

from posttrain.rl.history.audit import audit_stage


def require_hosts() -> None:
    """Skip the test, with a warning, where hosts cannot be made. A skipped test has shown nothing."""
    try:
        with Hosts() as hosts:
            hosts.add("probe")
    except (OSError, RuntimeError) as error:
        message = f"NOT TESTED: hosts cannot be made of namespaces here: {error}"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_hosts()
    with running(tmp_path_factory.mktemp("hosts"), {"left": 2, "right": 2}) as made:
        yield made


pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def test_a_driver_needs_a_node_of_ray_on_its_host(hosts: Cluster):
    hosts.hosts.add("bare", sees=[hosts.folder])
    run = hosts.start("bare", on="bare")
    assert run.wait(90) == 2
    assert "no node of Ray runs on this host (bare); start one that gives no CPUs away" in run.said()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"nodes": ["nowhere"]}, "resources.rollout: nodes: got 'nowhere', which is no host of the cluster; it has"),
        ({"labels": {"gpu": "h100"}}, "resources.rollout: labels: no host has gpu=h100"),
    ],
)
def test_a_host_or_a_label_that_the_cluster_lacks_is_named_before_anything_starts(hosts: Cluster, choice, message):
    run = hosts.start(f"lacks-{next(iter(choice))}", resources={"rollout": choice})
    assert run.wait(90) == 2
    assert message in run.said()
    assert not run.steps()


def test_an_engine_that_no_host_has_room_for_is_refused_though_all_together_have_it(hosts: Cluster):
    run = hosts.start("large", resources={"rollout": {"workers": 1, "cpus": 3, "labels": {"role": "engine"}}})
    assert run.wait(90) == 2
    assert "resources.rollout: asks for 1 × (3 CPU), each on one host" in run.said()
    assert "left has 2 CPU" in run.said()
    assert "none would fit: lower what each asks for" in run.said()


def test_a_wrong_token_is_told(hosts: Cluster):
    other = dataclasses.replace(hosts, env={**hosts.env, "RAY_AUTH_TOKEN": "f" * 64})
    run = other.start("token")
    assert run.wait(90) == 2
    assert "this driver was not let in" in run.said()
    assert "token (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)" in run.said()


def test_a_full_disk_on_the_host_of_an_engine_is_told_before_the_training(hosts: Cluster):
    left, cache = hosts.hosts.all["left"], "/tmp/.cache/posttrain/models"
    full = f"mkdir -p {cache} && mount -t tmpfs -o size=64k tmpfs {cache}"
    subprocess.run(left.command("sh", "-c", full), check=True)
    try:
        run = hosts.start("full", resources={"rollout": {"nodes": ["left"]}})
        assert run.wait() == 2
        assert f"host left: {cache} has 0.0 GB free, and the model" in run.said()
        assert "set POSTTRAIN_CACHE to a larger disk on that host" in run.said()
        assert not run.steps()
    finally:
        subprocess.run(left.command("umount", cache), check=True)


def test_engines_that_are_packed_are_on_one_host(hosts: Cluster):
    """Each host has room for both, and one of each has no more load than both of one."""
    run = hosts.start(
        "packed", steps=2, resources={"rollout": {"workers": 2, "labels": {"role": "engine"}, "pack": True}}
    )
    run.await_steps(1)
    cores = [sum("EngineCore" in line for line in host.processes().values()) for host in hosts.of_role("engine")]
    assert sorted(cores) == [0, 2]
    assert run.wait() == 0, run.said()


def test_engine_hosts_that_are_cut_off_and_powered_off_are_survived(hosts: Cluster):
    """After the cut no host has room for the engine that was lost; it waits until the host answers again."""
    left, right = hosts.hosts.all["left"], hosts.hosts.all["right"]
    run = hosts.start("rl", steps=100, resources={"rollout": {"workers": 2, "cpus": 2, "labels": {"role": "engine"}}})
    run.await_steps(4)

    right.cut()
    cut = time.time()
    run.await_event("engine_replaced")
    [suspected] = run.events("engine_replaced")
    assert "does not answer" in suspected["reason"]
    assert suspected["t"] - cut < 30  # Ray itself takes a minute
    run.await_event("engine_unplaced")
    run.await_steps(len(run.steps()) + 3)
    old = {pid for pid, line in right.processes().items() if "EngineCore" in line}
    assert old
    right.heal()
    run.until(lambda: not old & set(right.processes()))  # what was replaced is ended there
    run.until(lambda: bool(left_on(right)))  # now there is room for another
    run.await_steps(len(run.steps()) + 2)
    left.power_off()  # now all engines that work are lost at once
    assert run.wait(400) == 0, run.said()
    assert [line["step"] for line in run.steps()] == list(range(100))
    audit = audit_stage(run.stage)
    assert audit.is_clean, audit.problems
    assert audit.totals["engines_replaced"] >= 2
    assert not await_nothing_left(right)  # Ray ends the actors of a run that is over


def test_ranks_and_reference_are_on_other_hosts_and_the_loss_of_one_is_survived(hosts: Cluster, tmp_path: Path):
    """What the ranks read is on the home host's disk alone, and what they write is there in the end."""
    third, right = hosts.join("third"), hosts.hosts.all["right"]
    where = {"nodes": ["third", "right"], "spread": True, "cpus": 0.5}
    run = hosts.start(
        "ranks", steps=10, checkpoint_every=3, parallel={"processes": 2}, trainer_restarts=1,
        loss={"reference": {"weight": 0.1}}, weights={"delta": True},
        resources={"rollout": {"workers": 1, "nodes": ["right"]}, "trainer": where,
                   "reference": {"nodes": ["right"], "cpus": 0}},
    )  # fmt: skip
    run.await_steps(5)
    ranks = [sum("ray::Rank" in line for line in host.processes().values()) for host in (hosts.home, third, right)]
    assert ranks == [0, 1, 2]  # that of the reference is a rank too
    assert len(list(third.path("/tmp/.cache/posttrain/models").iterdir())) == 1  # the model, by its content
    third.power_off()
    run.await_event("trainer_restarted")
    assert "the host of a rank does not answer" in run.events("trainer_restarted")[0]["reason"]
    assert run.wait(300) == 0, run.said()
    assert [line["step"] for line in run.steps()] == list(range(10))
    assert all("reference_kl" in line for line in run.steps())
    audit = audit_stage(run.stage)
    assert audit.is_clean, audit.problems
    assert (run.stage / "model" / "model.safetensors").exists()
    assert len(list((run.stage / "checkpoints").glob("step_*"))) == 1
    assert not await_nothing_left(right)


def test_ranks_on_a_host_that_was_silent_for_half_a_minute_are_replaced_and_ended(hosts: Cluster):
    """Ray itself does not count such a host as lost: its ranks live through the cut, and wait for the others."""
    fourth, right = hosts.join("fourth"), hosts.hosts.all["right"]
    run = hosts.start(
        "silent", steps=60, checkpoint_every=3, parallel={"processes": 2}, trainer_restarts=1,
        resources={"rollout": {"workers": 1, "nodes": ["right"]},
                   "trainer": {"nodes": ["fourth", "right"], "spread": True, "cpus": 0.5}},
    )  # fmt: skip
    run.await_steps(4)
    fourth.cut()
    cut = time.time()
    run.await_event("trainer_restarted")
    [restarted] = run.events("trainer_restarted")
    assert "the host of a rank does not answer" in restarted["reason"]
    assert restarted["t"] - cut < 30  # Ray itself takes a minute
    old = {pid for pid, line in fourth.processes().items() if "ray::Rank" in line}
    assert len(old) == 1
    time.sleep(max(0.0, cut + 30 - time.time()))
    assert old <= set(fourth.processes())
    fourth.heal()
    run.until(lambda: not old & set(fourth.processes()))
    assert run.wait(400) == 0, run.said()
    assert [line["step"] for line in run.steps()] == list(range(60))
    audit = audit_stage(run.stage)
    assert audit.is_clean, audit.problems
    assert len(run.events("trainer_restarted")) == 1
    for host in (fourth, right):
        assert not await_nothing_left(host)


def test_a_run_goes_on_from_its_uri_on_another_host_after_its_home_host_is_gone(hosts: Cluster, tmp_path: Path):
    """An RL run, with a model, prompts and a reward that only the home host had."""
    run = hosts.start("kept", storage=True, steps=16, checkpoint_every=3, resources={"rollout": {"workers": 1}})
    run.await_steps(8)
    hosts.home.power_off()
    run.wait()
    again = hosts.resume(run, "spare")
    assert again.wait() == 0, again.said()
    assert [line["step"] for line in again.steps()] == list(range(16))
    # A host's files are reached through /proc, where SQLite opens none.
    audit = audit_stage(Path(shutil.copytree(again.stage, tmp_path / "rl")))
    assert audit.is_clean, audit.problems
    totals = audit.totals
    assert (totals["lost"], totals["trained_twice"], totals["resumed"]) == (0, 0, 1)
    assert (again.stage / "model" / "config.json").exists()
    assert not await_nothing_left(hosts.hosts.all["right"])
