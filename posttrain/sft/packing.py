"""Pack whole conversations into rows of a fixed capacity: best fit, in random order.

TRL's own packing sorts conversations by length first. This fills rows a little better, but one optimizer step then
trains on long conversations alone and the next on short ones alone. Here the conversations of every row are random.
"""

import bisect
import random
from collections.abc import Sequence
from typing import Any

from posttrain.tune.examples import PICTURES, Example
from posttrain.tune.steps import IGNORED


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Return rows of indices into `lengths`. The lengths of each row add up to at most `capacity`.

    Every index is in exactly one row. Rows are in the order in which they were opened. Raises ValueError for a length
    above the capacity. Example: lengths 3, 2, 5 and capacity 5 give rows with the lengths {3, 2} and {5}.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"length {length} is above the capacity {capacity}")
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def to_records(
    examples: Sequence[Example], capacity: int | None, seed: int, *, images: bool = False
) -> list[dict[str, Any]]:
    """Rows for TRL: input_ids, labels (IGNORED where the mask is 0), and seq_lengths of packed conversations.

    capacity: tokens of a row. None: one conversation in each row, and no seq_lengths. images: add the keys of the
    pictures of a row in order, as PICTURES.
    """
    labels = [[token if bit else IGNORED for token, bit in zip(e.ids, e.mask, strict=True)] for e in examples]
    rows = [[index] for index in range(len(examples))]
    if capacity is not None:
        rows = pack([len(e.ids) for e in examples], capacity, seed)
    records: list[dict[str, Any]] = []
    for row in rows:
        record: dict[str, Any] = {
            "input_ids": [token for index in row for token in examples[index].ids],
            "labels": [label for index in row for label in labels[index]],
        }
        if capacity is not None:
            record["seq_lengths"] = [len(examples[index].ids) for index in row]
        if images:
            record[PICTURES] = [key for index in row for key in examples[index].pictures]
        records.append(record)
    return records


def blank_record(example: Example, *, packed: bool, images: bool = False) -> dict[str, Any]:
    """A row of two tokens, from which nothing is learned; see posttrain/tune/steps.py.

    Both are the last token of a conversation, which stands for no picture.
    """
    record: dict[str, Any] = {"input_ids": [example.ids[-1]] * 2, "labels": [IGNORED, IGNORED]}
    return {**record, **({"seq_lengths": [2]} if packed else {}), **({PICTURES: []} if images else {})}
