"""How a process that is a rank ends: in one order, and without Python's finalisation.

barrier (all are alive) ─► destroy the process groups ─► forked ranks end ─► flush what was written ─► status 0
"""

import logging
import os
import sys

import torch.distributed as dist


def end_rank(forked: int = 0) -> None:
    """End this rank's process with status 0, once all ranks are here; does not return.

    For a process that is a rank and nothing else, when its work is done and its files are closed. A rank that failed
    raises instead, which ends it with status 1. forked: ranks that this process forked; they end before it.

    Why `os._exit`: gloo's threads take Python's lock after a collective, for instance to run a callback. On a loaded
    machine one of them may come to this when the main thread, which the collective has already let go, finalises
    Python. Python up to 3.13 ends a thread that asks for the lock then by unwinding its stack. That stack holds C++
    that forbids unwinding, so the process aborts with "terminate called without an active exception", status -6
    (tests/test_rank_ending.py forces this order). Destroying the groups alone is no guard: DeepSpeed holds references
    to them. `os._exit` finalises nothing; beyond flushing, which is done here, that would only free memory.
    Functions registered with `atexit` do not run.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    for _ in range(forked):
        os.wait()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
