"""Pack whole conversations into rows of a fixed capacity: best fit, in random order.

TRL's own packing sorts conversations by length first. This fills rows a little better, but one optimizer step then
trains on long conversations alone and the next on short ones alone. Here the conversations of every row are random.
"""

import bisect
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from posttrain.data.arrays import ArrayWriter, computed, copied, gathered, numbers_of, where
from posttrain.data.stored import Derived
from posttrain.tune.examples import PICTURES, Example
from posttrain.tune.steps import IGNORED

if TYPE_CHECKING:
    from posttrain.data.arrays import Array


def pack(lengths: Sequence[int], capacity: int, seed: int) -> "Packing":
    """Return rows of indices into `lengths`. The lengths of each row add up to at most `capacity`.

    Every index is in exactly one row. Rows are in the order in which they were opened. Raises ValueError for a length
    above the capacity. Example: lengths 3, 2, 5 and capacity 5 give rows with the lengths {3, 2} and {5}.
    """
    order = copied(range(len(lengths)))
    random.Random(seed).shuffle(order.data)  # pyright: ignore[reportArgumentType]
    row_of = ArrayWriter("q")  # of each index, in this order
    num_rows = 0
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in numbers_of(order):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"length {length} is above the capacity {capacity}")
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = capacity, num_rows
            num_rows += 1
        row_of.append(row)
        if left > length:
            bisect.insort(room, (left - length, row))
    return Packing(order, row_of.close())


class Packing(Sequence[list[int]]):
    """Rows of indices, which lie on disk. order: the indices. row_of: the row of each; no row is empty."""

    def __init__(self, order: "Array", row_of: "Array"):
        count = len(order)
        shift = count.bit_length()
        keys = computed(range(count), lambda places: row_of[places] << shift | places, np.int64)
        keys.sort()  # by the rows, and within a row by the place
        self._members = computed(keys, lambda block: order[block & ((1 << shift) - 1)], np.int64)
        self._starts = where(
            range(count), lambda places: (places == 0) | (keys[places - 1] >> shift != keys[places] >> shift)
        )

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        end = self._starts[row + 1] if row + 1 < len(self) else len(self._members)
        return self._members[self._starts[row] : end].tolist()


def to_records(
    examples: Sequence[Example], capacity: int | None, seed: int, *, images: bool = False
) -> Sequence[dict[str, Any]]:
    """Rows for TRL: input_ids, labels (IGNORED where the mask is 0), and seq_lengths of packed conversations.

    capacity: tokens of a row. None: one conversation in each row, and no seq_lengths. images: add the keys of the
    pictures of a row in order, as PICTURES. Each row is made when it is asked for.
    """

    def record(row: Sequence[int]) -> dict[str, Any]:
        members = [examples[index] for index in row]
        found: dict[str, Any] = {
            "input_ids": [token for example in members for token in example.ids],
            "labels": [label for example in members for label in _labels(example)],
        }
        if capacity is not None:
            found["seq_lengths"] = [len(example.ids) for example in members]
        if images:
            found[PICTURES] = [key for example in members for key in example.pictures]
        return found

    if capacity is None:
        return Derived(range(len(examples)), lambda index: record([index]))
    lengths = gathered((len(example.ids) for example in examples), "q")
    return Derived(pack(numbers_of(lengths), capacity, seed), record)


def _labels(example: Example) -> list[int]:
    return [token if bit else IGNORED for token, bit in zip(example.ids, example.mask, strict=True)]


def blank_record(example: Example, *, packed: bool, images: bool = False) -> dict[str, Any]:
    """A row of two tokens, from which nothing is learned; see posttrain/tune/steps.py.

    Both are the last token of a conversation, which stands for no picture.
    """
    record: dict[str, Any] = {"input_ids": [example.ids[-1]] * 2, "labels": [IGNORED, IGNORED]}
    return {**record, **({"seq_lengths": [2]} if packed else {}), **({PICTURES: []} if images else {})}
