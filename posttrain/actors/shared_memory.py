"""The files of shared memory of other people's code that processes have mapped.

Who maps a file reads and writes it also when its name is gone. So names that all who need them have opened can be
removed, and nothing is left whoever is killed.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

SHARED = Path("/dev/shm")
# How their names begin: Python's shared memory and semaphores, and those by which the parts of vLLM's engines add up.
NAMES = ("psm_", "sem.mp-", "vllm_dist_")


def shared_memory(pids: Iterable[int]) -> set[Path]:
    """The files that any of these processes of this user has mapped. Processes that are gone have none."""
    mapped: set[int] = set()  # inodes: a process maps a semaphore that it makes before the file has its name
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped |= {int(line.split()[4]) for line in lines if str(SHARED) in line}
    return {path for path, inode in shared_files() if inode in mapped}


def shared_files() -> list[tuple[Path, int]]:
    """All files with such names, and their inodes."""
    found = []
    for path in SHARED.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.name.startswith(NAMES):
                found.append((path, path.stat().st_ino))
    return found
