"""Which rows of a dataset are held out from training.

The choice depends only on a hash of each row's prompt. So it is the same for every seed, after a resume, and when the
rows are in another order. Rows with the same prompt stay together, because a held-out reply to a prompt that was
trained on says little about new prompts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

from posttrain.config.data import FilesConfig
from posttrain.config.held_out import HeldOutConfig
from posttrain.data.arrays import copied, gathered, numbers_of, where
from posttrain.data.files import read_records
from posttrain.data.messages import messages_to_json
from posttrain.data.places import Places
from posttrain.data.stored import pick
from posttrain.data.strata import hash_order
from posttrain.errors import DataError
from posttrain.records import Message

if TYPE_CHECKING:
    from posttrain.data.arrays import Array

T = TypeVar("T")
COUNTED_ROWS = 10_000  # a check before the run counts no further: a dataset with so many rows is large enough


def prompt_key(messages: Sequence[Message]) -> str:
    """The turns before the first assistant turn that is trained on, as JSON; all turns if there is no such prompt."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained is not False), None)
    return content_key(messages[:first] or messages)


def content_key(messages: Sequence[Message]) -> str:
    """The turns as JSON."""
    return json.dumps(messages_to_json(messages), sort_keys=True, ensure_ascii=False, default=str)


def check_apart(trained: Sequence[T], held_out: Sequence[T], name: Callable[[T], tuple[str, str]]) -> None:
    """Raise `DataError` if a held-out item is also trained on.

    name: (id, content as text) of an item.
    """
    places = Places(trained, lambda item: name(item)[1])
    both: list[tuple[str, str]] = []
    for item in held_out:
        identity, content = name(item)
        if (place := places.get(content)) is not None:
            both.append((identity, name(trained[place])[0]))
    if both:
        identity, other = both[0]
        raise DataError(
            f"held_out.path: {identity!r} has the same content as {other!r}, which is trained on ({len(both)} such "
            "rows); remove them from one of the two"
        )


def split(items: Sequence[T], keys: Iterable[str], config: HeldOutConfig) -> tuple[Sequence[T], Sequence[T]]:
    """The items that are trained on and the items that are held out, each sequence in the order of `items`.

    keys: one for each item, such as `prompt_key`. Items with the same key stay together, so a few fewer than
    `config` asks for may be held out. Raises `DataError` if no item would be left to train on.
    """
    import numpy as np

    if problem := rest_problem(config, len(items)):
        raise DataError(problem)
    hashes = gathered((hash_order(0, key) for key in keys), np.uint64)  # all that is kept of a key
    ordered = copied(hashes)
    ordered.sort()
    if ordered[0] == ordered[-1]:
        rule = f"all {len(items)} rows have the same prompt and stay together, so none would be left to train on"
        raise DataError(f"held_out: {rule}; give other rows as held_out.path")
    chosen = gathered(_chosen(ordered, config.count(len(items))), np.uint64)

    def is_apart(places: "Array") -> "Array":
        found = chosen.searchsorted(hashes[places])
        return chosen[np.minimum(found, len(chosen) - 1)] == hashes[places]

    every = range(len(items))
    return pick(items, where(every, lambda places: ~is_apart(places))), pick(items, where(every, is_apart))


def _chosen(hashes: "Array", wanted: int) -> Iterator[int]:
    """The hashes of the prompts to hold out, of those in order of all rows: those whose rows are still wanted.

    If every prompt has more rows than are wanted, it is one with the fewest rows.
    """
    fewest, smallest = len(hashes), 0
    is_any = False
    for value, rows in groupby(numbers_of(hashes)):
        size = sum(1 for _ in rows)
        if size <= wanted:
            is_any = True
            wanted -= size
            yield value
        if size < fewest:
            fewest, smallest = size, value
        if not wanted:
            break
    if not is_any:
        yield smallest


def rest_problem(config: HeldOutConfig, total: int) -> str:
    """The error text if `config` leaves none of `total` rows to train on, else ""."""
    if config.count(total) < total:
        return ""
    name, value = ("rows", config.rows) if config.rows is not None else ("fraction", config.fraction)
    return f"held_out.{name}: got {value}: of {total} rows none would be left to train on; lower it"


def share_problem(config: HeldOutConfig, data: FilesConfig) -> str:
    """As `rest_problem`, for a dataset. At most COUNTED_ROWS rows are counted, and their content is not checked."""
    if config.path is not None:
        return ""
    paths = [data.path] if isinstance(data.path, str) else data.path
    total = sum(1 for _ in islice(read_records(paths), min(data.limit or COUNTED_ROWS, COUNTED_ROWS)))
    return rest_problem(config, total) if total < COUNTED_ROWS else ""
