"""Checks that no held-out problem is also in a training set, even in another form.

Problems are compared by a key in each row, which is equal for two forms of the same problem, such as "3 + 4" and
"4 + 3". The author of the rows writes the key, because only the author knows which problems are the same.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from posttrain.config.data import FilesConfig
from posttrain.data.files import read_records
from posttrain.data.places import Places
from posttrain.data.rows import row_to_json
from posttrain.errors import DataError
from posttrain.records import Row


def check_heldout(rows: Sequence[Row], exclude: Sequence[FilesConfig], key_field: str) -> None:
    """Raise DataError if a row's key appears in a training set, or if a row on either side has no key."""
    heldout = Places(rows, lambda row: _key(row_to_json(row), key_field, f"held-out row {row.id}"))
    for where, record in _records(exclude):
        key = _key(record, key_field, where)
        if key in heldout:
            raise DataError(
                f"held-out row {rows[heldout[key]].id} has {key_field} {key}, and so has {where}, which is trained on; "
                "remove it from one of the two"
            )


def _records(sets: Sequence[FilesConfig]) -> Iterator[tuple[str, dict[str, Any]]]:
    for data in sets:
        paths = [data.path] if isinstance(data.path, str) else data.path
        for record in islice(read_records(paths), data.limit):
            if record.problem:
                raise DataError(f"{record.where}: {record.problem}")
            yield record.where, record.value


def _key(record: dict[str, Any], key_field: str, where: str) -> str:
    if record.get(key_field) is None:
        raise DataError(
            f"{where}: no {key_field!r}, so no training set can be compared; add the column, or change key_field"
        )
    return json.dumps(record[key_field], sort_keys=True, ensure_ascii=False, default=str)
