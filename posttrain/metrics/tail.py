"""Follows a metrics file that another process writes."""

import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.files import NewRecords


class NewLines:
    """The lines that are added to a metrics file from now on, even if a resumed stage rewrites the file."""

    def __init__(self, path: Path):
        self._records = NewRecords(path)
        self._newest = time.time()

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, numbers) of each whole line that was written since the last call.

        The numbers include `t`, a Unix time.
        """
        for record in self._records.read():
            try:
                step, written = int(record.pop("step")), float(record.pop("t"))
            except (ValueError, KeyError, TypeError):
                continue
            if written > self._newest:
                self._newest = written
                yield step, {name: value for name, value in record.items() if isinstance(value, int | float)}
