"""What a vLLM worker is working on, written where another process can read it even when the worker is frozen."""

import mmap
import os
import struct
import tempfile

SIZE = 512
BUILT = "the exchange"  # the note of a worker that has built new weights beside generation
FAILED = " (given up)"  # what it adds to its last note if it could not
HEAD = struct.Struct("<QI")  # how many notes there were; length of the last in bytes


def shared_file(prefix: str, size: int) -> str:
    """The path of a new file of so many zeros, which two processes can map. It is in memory where that is possible."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
    os.ftruncate(descriptor, size)
    os.close(descriptor)
    return path


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
        """Make a new file. Call `unlink` once the other process has opened it."""
        return cls(shared_file("posttrain-progress-", SIZE))

    def note(self, text: str) -> None:
        """Write what this process begins to work on."""
        self._count += 1
        data = text.encode()[: SIZE - HEAD.size]
        self._map[: HEAD.size + len(data)] = HEAD.pack(self._count, len(data)) + data

    def read(self) -> tuple[int, str]:
        """(number of notes so far, the last note)."""
        count, length = HEAD.unpack_from(self._map)
        return count, self._map[HEAD.size : HEAD.size + length].decode(errors="replace")

    def unlink(self) -> None:
        """Remove the file's name; both processes keep their mapping."""
        os.unlink(self.path)
