"""SFT and DPO whose ranks are on hosts that share nothing with the home host, made by benchmarks/hosts.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts_run import QUICK_HEALTH, Cluster, await_nothing_left, running
from test_hosts_rl import require_hosts
from tiny_policy import write_sums

from posttrain.files import read_jsonl

MODEL = {"path": "policy", "dtype": "float32"}
SFT = {
    "model": MODEL,
    "data": {"path": "sums.jsonl"},
    "batch_tokens": 256,
    "max_length": 256,
    "epochs": 20,
    "optimizer": {"learning_rate": 1e-4},
    "checkpoint_every": 5,
    "held_out": {"rows": 8, "every": 5, "keep_best": True},
    "parallel": {"processes": 2, "zero": 2},
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_hosts()
    with running(tmp_path_factory.mktemp("hosts"), {"left": 2, "right": 2}, [QUICK_HEALTH]) as made:
        yield made


pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def ranks_on(*names: str) -> dict[str, Any]:
    """The resources of ranks on these hosts."""
    return {"trainer": {"nodes": list(names), "spread": True, "cpus": 0.5}}


def sealed(stage: Path) -> list[int]:
    """The steps of the checkpoints on the home host."""
    return sorted(int(path.name.removeprefix("step_")) for path in (stage / "checkpoints").glob("step_*"))


def test_sft_goes_on_from_the_home_host_after_the_host_of_a_rank_is_powered_off(hosts: Cluster):
    """What the ranks read is on the home host's disk alone, and what they write is there as soon as it is complete."""
    left, right = hosts.hosts.all["left"], hosts.hosts.all["right"]
    write_sums(hosts.folder / "sums.jsonl", 96)
    run = hosts.start_stage("sft", "sft", {**SFT, "resources": ranks_on("left", "right")})
    run.await_event("checkpoint", 3)
    ranks = [sum("ray::Rank" in line for line in host.processes().values()) for host in (hosts.home, left, right)]
    assert ranks == [0, 1, 1]
    assert not left.path(str(hosts.folder)).exists()
    left.power_off()
    assert run.wait() == 3
    assert "the host of a rank does not answer" in run.said()
    stage = run.folder / "sft"
    assert sealed(stage)
    last = sealed(stage)[-1]
    assert not await_nothing_left(right)

    third = hosts.join("third")
    again = hosts.start_stage("sft", "sft", {**SFT, "resources": ranks_on("third", "right")})
    assert again.wait(400) == 0, again.said()
    assert [event["step"] for event in again.events("resumed")] == [last]
    steps = [line["step"] for line in again.steps() if "learning_rate" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (stage / "model" / "model.safetensors").exists()
    assert list(read_jsonl(stage / "checkpoints" / "evaluations.jsonl"))
    for host in (third, right):
        assert not await_nothing_left(host)
        assert not list(host.path("/tmp/.cache/posttrain/away").iterdir())


def test_dpo_on_another_host_brings_its_model_home(hosts: Cluster):
    pairs = [
        {
            "id": f"p{a}",
            "prompt": [{"role": "user", "content": f"Sum: {a} + 3"}],
            "chosen": f"Answer: {a + 3}",
            "rejected": f"Answer: {a + 4}",
        }
        for a in range(2, 10)
    ]
    (hosts.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "model": MODEL,
        "pairs": {"path": "pairs.jsonl"},
        "batch_size": 2,
        "max_length": 128,
        "parallel": {"processes": 2},
        "resources": ranks_on("third", "right"),
    }
    run = hosts.start_stage("dpo", "dpo", config)
    assert run.wait(300) == 0, run.said()
    assert (run.folder / "dpo" / "model" / "model.safetensors").exists()
    assert sealed(run.folder / "dpo")
    assert not await_nothing_left(hosts.hosts.all["right"])
