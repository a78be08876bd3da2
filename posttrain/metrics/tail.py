"""Follows a metrics file that another process writes."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path


class NewLines:
    """The lines that are added to a metrics file from now on, even if a resumed stage rewrites the file."""

    def __init__(self, path: Path):
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self._newest = time.time()

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, numbers) of each whole line that was written since the last call.

        The numbers include `t`, a Unix time.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                inode, is_longer = status.st_ino, status.st_size >= self._offset
                start = self._offset if inode == self._inode and is_longer else 0
                file.seek(start)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._inode, self._offset = inode, start + (len(whole) + 1 if whole else 0)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                step, written = int(record.pop("step")), float(record.pop("t"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if written > self._newest:
                self._newest = written
                yield step, {name: value for name, value in record.items() if isinstance(value, int | float)}
