"""Removes files that a process leaves when it is killed. Run by path, with the standard library.

    python afterwards.py PID PATTERN

On the home host a run's watchdog removes what is left. On another host nothing else of the run may be alive: Ray ends
its node there if the cluster has given the host up meanwhile, and with it every actor. So this waits for the process by
itself, as nobody's child, and ends right after it. It holds nothing but the process's descriptor.
"""

import glob
import os
import select
import subprocess
import sys


def remove_afterwards(pattern: str) -> None:
    """Have the files of a pattern removed once this process has ended, however it ends."""
    command = [sys.executable, "-S", "-E", __file__, str(os.getpid()), pattern]
    quiet = subprocess.DEVNULL
    subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, check=True)


def main(pid: int, pattern: str) -> None:
    """Return at once to the process that waits for this, and go on in another."""
    waited_for = os.pidfd_open(pid)
    if os.fork():
        return
    select.select([waited_for], [], [])
    for path in glob.glob(pattern):
        os.unlink(path)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
