"""Starts the ranks of a benchmark: processes of one thread on this host, without a GPU."""

import os
import socket
import subprocess
import sys


def run_ranks(script: str, world: int) -> list[str]:
    """What each rank prints. script: a Python file that takes RANK WORLD PORT. Ends the program if a rank fails."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise SystemExit(f"a rank of {world} failed:\n{errors[-3000:]}")
    return [output for output, _ in said]
