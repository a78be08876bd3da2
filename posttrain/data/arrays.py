"""Arrays of numbers that lie in temporary files, so that a number for each row costs no memory of the process.

A file has no name: it is gone with its array, also after a kill. It is mapped into memory, so the pages of it that are
in use lie in the page cache, which the system takes back when other programs need memory. The files lie in the folder
for temporary files (TMPDIR); on a tmpfs they would take memory after all. Numpy sorts such an array in its place.
Left out: arithmetic on whole arrays, whose results would lie in memory. It is done block by block.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]  # for annotations in quotes: a check of a config does not import numpy
    Places = range | Array

BLOCK = 1 << 16  # numbers that are in memory at once


def mapped(size: int, file: IO[bytes] | None = None) -> mmap.mmap:
    """A file of `size` bytes (at least 1) that are zero, mapped into memory. file: holds the bytes; None: a new one.

    Raises OSError if the disk has no room for it. Without the reservation, the first write to a page that finds no room
    would kill the process.
    """
    if file is not None:
        return mmap.mmap(file.fileno(), size)
    with tempfile.TemporaryFile() as made:
        try:
            os.posix_fallocate(made.fileno(), 0, size)
        except OSError as error:
            rule = f"{error.strerror}: {size} bytes are needed; make room there, or name another folder by TMPDIR"
            raise OSError(error.errno, rule, tempfile.gettempdir()) from None
        return mmap.mmap(made.fileno(), size)


def zeros(shape: int | tuple[int, ...], kind: Any) -> "Array":
    """An array of zeros. shape: of it. kind: its dtype."""
    import numpy as np

    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer(mapped(size), kind).reshape(shape) if size else np.zeros(shape, kind)


class ArrayWriter:
    """Takes numbers one by one. kind: the dtype of the array that they become."""

    def __init__(self, kind: Any):
        self._kind = kind
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # the array keeps it
        self._waiting: list[float] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, number: float) -> None:
        """Add a number."""
        self._waiting.append(number)
        self._count += 1
        if len(self._waiting) == BLOCK:
            self._write()

    def extend(self, numbers: "Array") -> None:
        """Add the numbers of an array."""
        self._write()
        self._file.write(numbers.astype(self._kind).tobytes())
        self._count += len(numbers)

    def close(self) -> "Array":
        """The array of the numbers."""
        import numpy as np

        self._write()
        with self._file as file:
            file.flush()
            return np.frombuffer(mapped(file.tell(), file), self._kind) if self._count else np.zeros(0, self._kind)

    def _write(self) -> None:
        import numpy as np

        self._file.write(np.array(self._waiting, self._kind).tobytes())
        self._waiting = []


def gathered(numbers: Iterable[float], kind: Any) -> "Array":
    """The array of these numbers. kind: its dtype."""
    writer = ArrayWriter(kind)
    for number in numbers:
        writer.append(number)
    return writer.close()


def blocks(places: "Places") -> Iterator["Array"]:
    """The places, a block at a time."""
    import numpy as np

    for start in range(0, len(places), BLOCK):
        part = places[start : start + BLOCK]
        yield np.arange(part.start, part.stop, part.step) if isinstance(part, range) else part


def computed(places: "Places", make: Callable[["Array"], "Array"], kind: Any) -> "Array":
    """The array of what `make` makes of the places, of which it gets a block at a time. kind: its dtype."""
    found = zeros(len(places), kind)
    start = 0
    for block in blocks(places):
        found[start : start + len(block)] = make(block)
        start += len(block)
    return found


def where(places: "Places", test: Callable[["Array"], "Array"]) -> "Array":
    """The places that pass a test, which gets a block of places and says which of them do."""
    writer = ArrayWriter("q")
    for block in blocks(places):
        writer.extend(block[test(block)])
    return writer.close()


def copied(numbers: "Places") -> "Array":
    """A copy of an array of one dimension, or the array of a range."""
    return computed(numbers, lambda block: block, getattr(numbers, "dtype", "q"))


def shuffled(count: int, rng: Random) -> "Array":
    """The numbers below `count` in random order, which is that of `rng.sample(range(count), count)`."""
    found = copied(range(count))
    numbers = found.data
    # Each step of `sample` takes one of the numbers that are left, and moves the last of them to its place.
    for last in range(count - 1, -1, -1):
        place = rng.randrange(last + 1)
        numbers[place], numbers[last] = numbers[last], numbers[place]
    return found[::-1]


def numbers_of(array: "Array") -> Sequence[Any]:
    """The numbers of an array of one dimension as Python's, without a copy."""
    return array.data
