"""End a process that is a rank, in a fixed order and without Python's finalisation.

barrier (all ranks are alive) ─► destroy process groups ─► wait for forked ranks to end ─► flush output ─► status 0
"""

import logging
import os
import sys

import torch.distributed as dist


def end_rank(forked: int = 0) -> None:
    """End this process with status 0 once all ranks have called this function. It does not return.

    It is for a process that is a rank and nothing else, when its work is done and its files are closed. A rank that
    failed raises instead, which ends it with status 1. forked: how many ranks this process forked; they end before it.

    Why `os._exit`: after a collective, gloo's threads take Python's lock, for instance to run a callback. On a loaded
    machine a thread may do so late, when the main thread has left the collective and already finalises Python. Python
    up to 3.13 ends a thread that asks for the lock at that time by unwinding its stack. The stack holds C++ code that
    forbids unwinding, so the process aborts with "terminate called without an active exception", status -6
    (tests/test_rank_ending.py forces this order). Destroying the process groups does not prevent it, because DeepSpeed
    holds references to them. `os._exit` skips finalisation, which would only flush output, done here, and free memory.
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
