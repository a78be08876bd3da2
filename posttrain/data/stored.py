"""Sequences of records that lie in an Arrow file on disk and are decoded one by one, so that memory does not grow.

    records ─► StoreWriter ─► an Arrow file: one column of encoded records ─► memory map ─► Stored, a sequence

Of a `Stored`, only a list of its batches is in memory. Where a part or another order of it was taken, the places of
these records lie on disk, too (arrays.py). The pages of the file that were read lie in the page cache, which the
system reclaims when it needs memory.
Left out: changes of a record. A new sequence is written instead.
"""

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

from posttrain.data.arrays import computed

if TYPE_CHECKING:
    import numpy as np

    Indices = np.ndarray[Any, np.dtype[np.int64]]

T = TypeVar("T")
S = TypeVar("S")
BATCH_BYTES = 4 << 20  # encoded records that are in memory at once


class StoreWriter(Generic[T]):
    """Writes records of one type, and gives the sequence of them.

    kind: the type of a record: a msgspec struct, a dataclass, or a type of JSON values. folder: where the file lies;
    None: in the folder for temporary files. name: of the file, which stays, so that other processes can open it. A file
    without a name is deleted as soon as it is open, so a killed process leaves nothing behind.
    """

    def __init__(self, kind: Any, folder: Path | None = None, name: str | None = None):
        import pyarrow as pa

        self._kind, self._named = kind, name is not None
        if name is not None:
            assert folder is not None, "a file with a name needs a folder"
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / name
        else:
            with tempfile.NamedTemporaryFile(prefix=".rows-", suffix=".arrow", dir=folder, delete=False) as file:
                self._path = Path(file.name)
        self._encoder = msgspec.json.Encoder(enc_hook=str)
        self._schema = pa.schema([("record", pa.large_binary())])
        self._file = pa.ipc.new_file(str(self._path), self._schema)
        self._waiting: list[bytes] = []
        self._bytes = self._count = 0

    def __enter__(self) -> "StoreWriter[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.discard()

    def __len__(self) -> int:
        return self._count

    def append(self, record: T) -> None:
        """Add a record."""
        encoded = self._encoder.encode(record)
        self._waiting.append(encoded)
        self._bytes += len(encoded)
        self._count += 1
        if self._bytes > BATCH_BYTES:
            self._write()

    def close(self) -> "Stored[T]":
        """End the file, and return the sequence of its records."""
        self._write()
        self._file.close()
        stored: Stored[T] = Stored(self._path, self._kind)
        column = stored.column
        if not self._named:
            self._path.unlink()
            stored = Stored(None, self._kind, column=column)
        return stored

    def discard(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._file.write_batch(pa.record_batch([pa.array(self._waiting, pa.large_binary())], schema=self._schema))
        self._waiting, self._bytes = [], 0


class Stored(Sequence[T]):
    """The records of a file, or some of them in any order. A record is decoded each time it is asked for.

    A sequence whose file has a name can be sent to another process, which opens the file when it first reads a record.
    Equal to any sequence of equal records.
    """

    def __init__(self, path: Path | None, kind: Any, order: "Indices | None" = None, *, column: Any = None):
        """order: the places of the records in the file; None: all of them. column: of the file, where it is open."""
        self.path, self._kind, self._order = path, kind, order
        if column is not None:
            self.column = column
        self._decoder = msgspec.json.Decoder(kind)

    @cached_property
    def column(self) -> Any:
        """The column of the file, which is opened here."""
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all().column(0)

    @cached_property
    def _chunks(self) -> Any:
        return self.column.chunks

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(chunk) for chunk in self._chunks)]

    def __len__(self) -> int:
        return len(self.column) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Stored[T]":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        place = range(len(self))[index]
        if self._order is not None:
            place = int(self._order[place])
        number = bisect_right(self._starts, place) - 1
        return self._decoder.decode(self._chunks[number][place - self._starts[number]].as_buffer())

    def __iter__(self) -> Iterator[T]:
        if self._order is not None:
            yield from (self[index] for index in range(len(self)))
            return
        for chunk in self._chunks:
            for item in chunk:
                yield self._decoder.decode(item.as_buffer())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        if self.path is None:
            raise TypeError("these records lie in a file without a name, which no other process can open")
        return Stored, (self.path, self._kind, self._order)

    def moved(self, folder: Path) -> "Stored[T]":
        """The same records, if the file lies in another folder under its own name."""
        assert self.path is not None, "a file without a name lies nowhere else"
        return Stored(folder / self.path.name, self._kind, self._order)

    def take(self, indices: "Sequence[int] | Indices") -> "Stored[T]":
        """The records at these indices, in their order."""
        import numpy as np

        own = self._order
        places = indices if isinstance(indices, range) else np.asarray(indices, np.int64)
        if own is not None or isinstance(places, range):
            places = computed(places, lambda block: block if own is None else own[block], np.int64)
        return Stored(self.path, self._kind, places, column=self.column)


def store(records: Iterable[T], kind: Any, folder: Path | None = None) -> Stored[T]:
    """Write records to a file, and return the sequence of them. The arguments are those of `StoreWriter`."""
    with StoreWriter[T](kind, folder) as writer:
        for record in records:
            writer.append(record)
        return writer.close()


def pick(records: Sequence[S], indices: "Sequence[int] | Indices") -> Sequence[S]:
    """The records at these indices: on disk, where `records` are, else as a list."""
    return records.take(indices) if isinstance(records, Stored) else [records[int(index)] for index in indices]


class Derived(Sequence[T], Generic[S, T]):
    """What `make` makes of each of `items`, each time it is asked for, so that it is never in memory for all items."""

    def __init__(self, items: Sequence[S], make: Callable[[S], T]):
        self.items, self._make = items, make

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Derived[S, T]": ...
    def __getitem__(self, index: int | slice) -> "T | Derived[S, T]":
        if isinstance(index, slice):
            return Derived(self.items[index], self._make)
        return self._make(self.items[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._make, self.items)

    def at(self, indices: "Sequence[int] | Indices") -> "Derived[S, T]":
        """What is made of the items at these indices, in their order."""
        return Derived(pick(self.items, indices), self._make)
