"""The place of each row by its name, on disk, in 8 bytes a row, however long the names are.

A number for each row holds the first bits of a hash of its name, and its place in the other bits. The numbers are
sorted. The row itself, which may lie on disk, says whether a place with these bits is meant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from posttrain.data.arrays import gathered
from posttrain.data.strata import hash_order

T = TypeVar("T")


class Places(Mapping[str, int], Generic[T]):
    """The place of each row in `rows` by what `name` makes of it. Of rows with the same name, the first is found."""

    def __init__(self, rows: Sequence[T], name: Callable[[T], str]):
        self._rows, self._name = rows, name
        self._bits = len(rows).bit_length()  # of a place
        self._numbers = gathered((self._hash(name(row)) | place for place, row in enumerate(rows)), "Q")
        self._numbers.sort()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return map(self._name, self._rows)

    def __getitem__(self, name: str) -> int:
        wanted = self._hash(name)
        at = int(self._numbers.searchsorted(self._numbers.dtype.type(wanted)))
        while at < len(self):
            place = int(self._numbers[at]) - wanted
            if place >> self._bits:  # another hash
                break
            if self._name(self._rows[place]) == name:
                return place
            at += 1
        raise KeyError(name)

    def _hash(self, name: str) -> int:
        return hash_order(0, name) >> self._bits << self._bits
