"""Engines of several parts (`engine.tensor_parallel`) on a CPU: their cores, their weights, and what they leave."""

import os
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest
from test_rl import make_config, rows_of, run_stage
from tiny_policy import ENGINE

from posttrain.actors.shared_memory import shared_files, shared_memory
from posttrain.config.engines import EngineConfig
from posttrain.sampling import arguments
from posttrain.sampling.arguments import PARTS, cpu_environment, num_memory_nodes


@pytest.mark.parametrize(("list_", "number"), [("0", 1), ("0-1", 2), ("0,2-4,7", 5)])
def test_the_numa_nodes_of_a_process_are_counted(tmp_path: Path, list_: str, number: int):
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nMems_allowed:\t00000001\nMems_allowed_list:\t{list_}\nUid:\t0\n")
    assert num_memory_nodes(status) == number
    assert num_memory_nodes(tmp_path / "none") == 1


def test_parts_of_an_engine_share_all_cores_where_there_are_fewer_numa_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PARTS, raising=False)
    monkeypatch.setattr(arguments, "num_memory_nodes", lambda: 2)
    assert [cpu_environment(EngineConfig(tensor_parallel=parts)).get(PARTS) for parts in (1, 2, 4)] == [
        None,
        None,
        "nobind",
    ]
    monkeypatch.setenv(PARTS, "0|1|2|3")  # the user's
    assert cpu_environment(EngineConfig(tensor_parallel=4))[PARTS] == "0|1|2|3"


def test_shared_memory_is_found_by_the_processes_that_have_mapped_it():
    held = SharedMemory(create=True, size=16)
    path = Path(f"/dev/shm/{held.name}")
    try:
        assert path in shared_memory([os.getpid(), os.getppid()])
        assert path not in shared_memory([os.getppid()])
        path.unlink()
        held.buf[0] = 7  # a file without a name goes on
        assert path not in shared_memory([os.getpid()])
    finally:
        held.close()
        path.touch()  # for `unlink`, which also tells Python's tracker
        held.unlink()


@pytest.mark.slow
@pytest.mark.full  # an engine of two parts takes a minute to start
@pytest.mark.timeout(600)
def test_weights_of_divided_ranks_reach_an_engine_of_two_parts_which_leaves_nothing(ranks, tiny_model, tmp_path):
    """Two ranks divide experts and weights (ZeRO 3). If a part had a wrong weight, sampler and trainer would differ."""
    before = {path for path, _ in shared_files()}
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math"]),
        steps=4,
        max_staleness=0,
        parallel={"processes": 2, "expert": 2, "zero": 3},
        engine={**ENGINE, "tensor_parallel": 2, "deadline_s": 60.0},
        resources={"rollout": {"cpus": 0.5}, "trainer": {"cpus": 0.25}},
    )
    outputs, metrics = run_stage(config, tmp_path / "rl", warm=False)
    assert outputs["parity_mean_gap"] < 1e-5
    assert [line["step"] for line in metrics] == list(range(4))
    assert all(line["mismatch_kl"] < 1e-6 for line in metrics)
    left = {path for path, _ in shared_files()} - before - shared_memory(psutil.pids())
    assert not left
