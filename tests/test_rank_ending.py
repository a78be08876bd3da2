"""Ranks end with status 0 however late a thread of gloo wants Python's lock, and however often they are started.

The late thread is forced: rank 0 finalises Python, or ends as ranks do, while a collective with a callback still waits
for rank 1. Finalisation is stretched by an object that sleeps when it is deleted, and rank 1 joins only then.
"""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from posttrain.cli.doctor_probes import deepspeed_rank

LATE_CALLBACK = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from posttrain.parallel import ending

rank, folder, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
ending_file = folder / "ending"

class Slow:
    def __del__(self, sleep=time.sleep, path=ending_file):
        path.touch()
        sleep(3)

if rank == 0:
    work = dist.all_reduce(torch.zeros(3), async_op=True)
    work.get_future().then(lambda future: None)
    print("written", end="")
    if how == "finalise":
        sys.last_value = Slow()  # the first thing that finalisation deletes
    else:
        ending_file.touch()
        ending.end_rank()
else:
    while not ending_file.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(3))
    if how == "end_rank":
        ending.end_rank()
"""


def statuses(folder, how: str) -> tuple[list[int], str]:
    """Exit statuses of both ranks, and what rank 0 wrote."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE_CALLBACK, str(rank), str(folder), how],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        written = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], written[0]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_late_callback_aborts_finalisation_and_not_a_rank_that_ends(tmp_path):
    for how in ("finalise", "end_rank"):
        (tmp_path / how).mkdir()
    assert statuses(tmp_path / "end_rank", "end_rank") == ([0, 0], "written")
    if sys.version_info < (3, 14):  # later ones let the thread hang
        assert statuses(tmp_path / "finalise", "finalise")[0][0] == -6


def start_and_end(times: int) -> None:
    """Two ranks take a step and end, so many times.

    They are forked from a process that has imported DeepSpeed, because the import takes most of the time of a start,
    and has no part in its end.
    """
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(
        ["deepspeed", "torch._dynamo", "posttrain.compat.deepspeed", "posttrain.parallel.ending"]
    )
    for _ in range(times):
        with TemporaryDirectory() as folder:
            ranks = [forked.Process(target=deepspeed_rank, args=(rank, 2, Path(folder))) for rank in range(2)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_start_and_end_three_times(monkeypatch):
    """tests/test_doctor.py starts two ranks that import by themselves."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    start_and_end(3)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_two_ranks_start_and_end_200_times_under_load(monkeypatch):
    """Beside two processes that keep two cores busy."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        start_and_end(200)
    finally:
        for process in busy:
            process.kill()
