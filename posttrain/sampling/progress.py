"""What a vLLM worker is working on, written where another process can read it even when the worker is frozen."""

import mmap
import os
import struct

SIZE = 512
BUILT = "the exchange"  # the note of a worker that has built new weights beside generation
FAILED = " (given up)"  # what it adds to its last note if it could not
HEAD = struct.Struct("<QI")  # how many notes there were; length of the last in bytes


def shared_file(name: str, size: int) -> str:
    """The path of a new file of so many zeros in memory, which another process can open while this one lives.

    It has no name in any folder, so nothing is left whoever is killed. `give_up` closes it.
    """
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, size)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def give_up(path: str) -> None:
    """Close a `shared_file` of this process. Those who have mapped it keep it."""
    os.close(int(path.rpartition("/")[2]))


class Progress:
    """A counter and a note of up to 500 bytes in a small file that two processes map.

    The reader sees that the writer gets on when the counter changes between two reads.
    """

    def __init__(self, path: str):
        self.path = path
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._count = 0

    @classmethod
    def create(cls) -> "Progress":
        """Make a new file. Call `give_up` once the other process has opened it."""
        return cls(shared_file("posttrain-progress", SIZE))

    def note(self, text: str) -> None:
        """Write what this process begins to work on."""
        self._count += 1
        data = text.encode()[: SIZE - HEAD.size]
        self._map[: HEAD.size + len(data)] = HEAD.pack(self._count, len(data)) + data

    def read(self) -> tuple[int, str]:
        """(number of notes so far, the last note)."""
        count, length = HEAD.unpack_from(self._map)
        return count, self._map[HEAD.size : HEAD.size + length].decode(errors="replace")

    def give_up(self) -> None:
        """Give up the path; both processes keep their mapping."""
        give_up(self.path)
