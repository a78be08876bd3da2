"""Where a worker is in a long piece of work, seen from another process even when the worker is frozen."""

import mmap
import os
import struct
import tempfile

SIZE = 512
HEAD = struct.Struct("<QI")  # how many notes there were; length of the last in bytes


class Progress:
    """A note of up to 500 bytes in a small shared file."""

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
        """Make a new file. Unlink it once the other process has opened it."""
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        descriptor, path = tempfile.mkstemp(prefix="posttrain-progress-", dir=folder)
        os.ftruncate(descriptor, SIZE)
        os.close(descriptor)
        return cls(path)

    def note(self, text: str) -> None:
        """Say where we are."""
        self._count += 1
        data = text.encode()[: SIZE - HEAD.size]
        self._map[: HEAD.size + len(data)] = HEAD.pack(self._count, len(data)) + data

    def read(self) -> tuple[int, str]:
        """How many notes there were, and the last."""
        count, length = HEAD.unpack_from(self._map)
        return count, self._map[HEAD.size : HEAD.size + length].decode(errors="replace")

    def unlink(self) -> None:
        """Remove the file; both ends keep what they have open."""
        os.unlink(self.path)
