"""The place of each row by its name, in 16 bytes of memory a row, however long the names are.

A hash of each name is in memory. The row itself, which may lie on disk, says whether a place with that hash is meant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from posttrain.data.strata import hash_order

T = TypeVar("T")


class Places(Mapping[str, int], Generic[T]):
    """The place of each row in `rows` by what `name` makes of it. Of rows with the same name, any one is found."""

    def __init__(self, rows: Sequence[T], name: Callable[[T], str]):
        import numpy as np

        self._rows, self._name = rows, name
        hashes = np.fromiter((hash_order(0, name(row)) for row in rows), np.uint64, len(rows))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return map(self._name, self._rows)

    def __getitem__(self, name: str) -> int:
        wanted = self._hashes.dtype.type(hash_order(0, name))
        at = int(self._hashes.searchsorted(wanted))
        while at < len(self) and self._hashes[at] == wanted:
            place = int(self._order[at])
            if self._name(self._rows[place]) == name:
                return place
            at += 1
        raise KeyError(name)
