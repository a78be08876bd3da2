"""Which rows of a dataset are held out from training.

The choice depends only on a hash of each row's prompt. So it is the same for every seed, after a resume, and when the
rows are in another order. Rows with the same prompt stay together, because a held-out reply to a prompt that was
trained on says little about new prompts.
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
COUNTED_ROWS = 10_000  # a check before the run counts no further: a dataset with so many rows is large enough


def prompt_key(messages: Sequence[Message]) -> str:
    """The turns before the first assistant turn that is trained on, as JSON; all turns if there is no such prompt."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained is not False), None)
    return content_key(messages[:first] or messages)


def content_key(messages: Sequence[Message]) -> str:
    """The turns as JSON."""
    return json.dumps(messages_to_json(messages), sort_keys=True, ensure_ascii=False, default=str)


def check_apart(trained: Iterable[tuple[str, str]], held_out: Iterable[tuple[str, str]]) -> None:
    """Raise `DataError` if a held-out row is also trained on. Both arguments are pairs (id, content as text)."""
    ids = {content: name for name, content in trained}
    both = [(name, ids[content]) for name, content in held_out if content in ids]
    if both:
        name, other = both[0]
        raise DataError(
            f"held_out.path: {name!r} has the same content as {other!r}, which is trained on ({len(both)} such rows); "
            "remove them from one of the two"
        )


def split(items: Sequence[T], keys: Sequence[str], config: HeldOutConfig) -> tuple[list[T], list[T]]:
    """The items that are trained on and the items that are held out, each list in the order of `items`.

    keys: one for each item, such as `prompt_key`. Items with the same key stay together, so a few fewer than
    `config` asks for may be held out. Raises `DataError` if no item would be left to train on.
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
    chosen = chosen or {min(order, key=lambda key: sizes[key])}  # every prompt has more rows than are wanted
    kept = [item for item, key in zip(items, keys, strict=True) if key not in chosen]
    return kept, [item for item, key in zip(items, keys, strict=True) if key in chosen]


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
