"""The files of a run: JSON lines that grow, and files and folders that are either whole or absent.

A reader never sees half of a file. A file or folder is written under another name in the same folder, and renamed when
it is complete: a crash leaves the old content, or none. A file that grows is appended to by whole lines with one
`write` each, so that several processes may write to it and a crash can cut off only the last line.
"""

import glob
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

OUT_OF_SPACE = (28, 122, 27)  # ENOSPC, EDQUOT, EFBIG
_SUFFIX = ".writing"
_count = itertools.count()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; when the block ends without an error it becomes `path`.

    What was at `path` stays until then. An error, and a crash, leave `path` as it was. Any number of processes may
    replace the same path at once: the last one wins, whole. A file is flushed to the disk before it is renamed. A
    folder cannot be renamed over another one, so an older folder is moved aside first and deleted afterwards.

    >>> with replacing(Path("out.json")) as aside:
    ...     aside.write_text("{}")
    """
    path = Path(path)
    _sweep(path)
    # The host and the process are in the name, so that what a crash left can be told from what is being written.
    aside = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{next(_count)}{_SUFFIX}")
    try:
        yield aside
        if aside.is_dir():
            replace_folder(aside, path)
        else:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
    except BaseException:
        remove(aside)
        raise


def replace_folder(aside: Path, target: Path) -> None:
    """Rename a complete folder to its place, for folders that several processes write together; use `replacing`
    for others.
    """
    old = aside.with_suffix(".old")
    with suppress(FileNotFoundError):
        target.rename(old)
    aside.rename(target)
    remove(old)


def move_folder(path: Path, target: Path) -> None:
    """Move a folder, at once, to a place on the same file system where nothing is; folders above it are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def _sweep(path: Path) -> None:
    """Delete what dead processes of this host left behind when they wrote `path`."""
    start = f".{path.name}.{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(start)}*{_SUFFIX}"):
        number = left.name.removeprefix(start).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            remove(left)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing, cannot be read or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append one record as one line. A single `write` to a file opened for appending does not interleave."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, object]]) -> int:
    """Write a file of JSON lines, whole or not at all; returns their number. Raises ValueError for NaN and infinity."""
    count = 0
    with replacing(Path(path)) as aside, aside.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, on_bad: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file.

    A last line that a crash cut off is left out. on_bad: called for any other line that is not a JSON object, which is
    then left out; without it such a line raises ValueError.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="strict" if on_bad is None else "replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n") or not line.strip():
                continue
            record = _object(line)
            if record is not None:
                yield record
            elif on_bad is not None:
                on_bad()
            else:
                raise ValueError(f"{path}, line {number}: {line.strip()[:80]!r} is not a JSON object")


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool], on_bad: Callable[[], None] | None = None) -> None:
    """Take the records out of a file of JSON lines for which `wanted` is False. Nothing where there is no file.

    on_bad: as for `read_jsonl`.
    """
    if path.exists():
        write_jsonl(path, [record for record in read_jsonl(path, on_bad) if wanted(record)])


class NewRecords:
    """The records that other processes add to a file of JSON lines, each once.

    A file that was replaced or became shorter is read from its beginning: a resumed stage rewrites its files.
    from_end: what is in the file already is left out.
    """

    def __init__(self, path: Path, *, from_end: bool = False):
        self._path = path
        self._inode, self._offset = None, 0
        if from_end and path.exists():
            status = path.stat()
            self._inode, self._offset = status.st_ino, status.st_size

    def read(self) -> list[dict[str, Any]]:
        """The records of whole lines that were written since the last call. Lines that are not JSON are left out."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_same = status.st_ino == self._inode and status.st_size >= self._offset
                start = self._offset if is_same else 0
                file.seek(start)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._inode, self._offset = status.st_ino, start + len(whole) + len(end)
        return [record for line in whole.split(b"\n") if (record := _object(line)) is not None]


def _object(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def content_hash(path: Path) -> str:
    """SHA-256 of a file, which is read whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """The time now, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
