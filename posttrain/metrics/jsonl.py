"""Append-only JSON lines: one whole line a write, so that several processes may append to one file."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as one line. A single `write` to a file opened for appending does not interleave."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the whole lines of a file; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def keep_steps_before(path: Path, step: int) -> None:
    """Take the lines of `step` and later out of a metrics file: they will be trained, and written, again."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record["step"] < step]
        aside = path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        aside.replace(path)


class NewLines:
    """Lines added to a metrics file from now on; also where a stage that is resumed rewrites the file."""

    def __init__(self, path: Path):
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self._newest = time.time()

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, numbers) of each whole line that was written since the last call, a Unix time `t` in each."""
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


def utc_now() -> str:
    """The time now, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
