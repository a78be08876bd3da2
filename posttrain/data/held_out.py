"""Which rows of a dataset are held out from training.

The choice depends on the content of the rows alone: on a hash of each row's prompt. So it is the same for every seed,
after a resume, and for rows in another order. Rows with the same prompt are on the same side, because a reply to a
prompt that was trained on measures little.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar

from posttrain.config.data import FilesConfig
from posttrain.config.held_out import HeldOutConfig
from posttrain.data.files import read_records
from posttrain.data.messages import messages_to_json
from posttrain.data.strata import hash_order
from posttrain.errors import DataError
from posttrain.records import Message

T = TypeVar("T")
COUNTED_ROWS = 10_000  # a dataset of so many rows is taken to have enough of them


def prompt_key(messages: Sequence[Message]) -> str:
    """The turns before the first reply that is trained on, as JSON; all turns if there are none before it."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained is not False), None)
    return content_key(messages[:first] or messages)


def content_key(messages: Sequence[Message]) -> str:
    """The turns as JSON."""
    return json.dumps(messages_to_json(messages), sort_keys=True, ensure_ascii=False, default=str)


def check_apart(trained: Iterable[tuple[str, str]], held_out: Iterable[tuple[str, str]]) -> None:
    """Raise `DataError` if something held out is also trained on. Both are pairs of an id and a content as text."""
    ids = {content: name for name, content in trained}
    both = [(name, ids[content]) for name, content in held_out if content in ids]
    if both:
        name, other = both[0]
        raise DataError(
            f"held_out.path: {name!r} has the same content as {other!r}, which is trained on ({len(both)} such rows); "
            "remove them from one of the two"
        )


def split(items: Sequence[T], keys: Sequence[str], config: HeldOutConfig) -> tuple[list[T], list[T]]:
    """The items that are trained on, and those that are held out, each in their order.

    keys: of each item; items with the same key stay together, so that a few less may be held out than asked for.
    Raises `DataError` if nothing would be left to train on.
    """
    if problem := rest_problem(config, len(items)):
        raise DataError(problem)
    wanted = config.count(len(items))
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) == 1:
        rule = f"all {len(items)} rows have the same prompt and stay together, so none would be left to train on"
        raise DataError(f"held_out: {rule}; give other rows as held_out.path")
    order = sorted(sizes, key=lambda key: (hash_order(0, key), key))
    chosen: set[str] = set()
    for key in order:
        if sizes[key] <= wanted:
            chosen.add(key)
            wanted -= sizes[key]
    chosen = chosen or {min(order, key=lambda key: sizes[key])}  # each prompt has more rows than are wanted
    kept = [item for item, key in zip(items, keys, strict=True) if key not in chosen]
    return kept, [item for item, key in zip(items, keys, strict=True) if key in chosen]


def rest_problem(config: HeldOutConfig, total: int) -> str:
    """What is wrong if `config` leaves nothing of `total` rows to train on; "" if it does."""
    if config.count(total) < total:
        return ""
    name, value = ("rows", config.rows) if config.rows is not None else ("fraction", config.fraction)
    return f"held_out.{name}: got {value}: of {total} rows none would be left to train on; lower it"


def share_problem(config: HeldOutConfig, data: FilesConfig) -> str:
    """As `rest_problem`, for a dataset, of which at most COUNTED_ROWS rows are counted and none is checked."""
    if config.path is not None:
        return ""
    paths = [data.path] if isinstance(data.path, str) else data.path
    total = sum(1 for _ in islice(read_records(paths), min(data.limit or COUNTED_ROWS, COUNTED_ROWS)))
    return rest_problem(config, total) if total < COUNTED_ROWS else ""
