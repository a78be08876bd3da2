"""Raw records of a dataset, in order, each with the file and the row number it came from.

Rows are yielded one by one, and at most one batch of a file is in memory. A path is a
file, a folder of files, a folder saved by `datasets.save_to_disk`, or a dataset's name on a hub (hub.py). The
`datasets` package is never imported, because this code also runs while a config is validated and must be fast.
Left out: encodings other than UTF-8.
"""

import difflib
import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.hub import located
from posttrain.data.readers import READERS, data_suffix
from posttrain.data.splits import check_one_split, files_of_split
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read. `number` counts from 1: lines in JSON lines, rows without the header elsewhere.

    label: the file's name within the dataset, for ids. problem: why `value` is empty, if it could not be parsed.
    """

    file: str
    label: str
    number: int
    value: dict[str, Any]
    problem: str = ""

    @property
    def where(self) -> str:
        """The place of the row, such as `data/sft.jsonl: row 7`."""
        return f"{self.file}: row {self.number}"


def read_records(
    paths: Sequence[str | Path], weights: Sequence[float] | None = None, seed: int = 0
) -> Iterator[Record]:
    """Yield the records of files and folders, in the order given (files of a folder by name).

    weights: one for each path. With them, each row is drawn from a path with a probability proportional to its weight,
    by a generator with `seed`, until one path has no more rows. Raises `DataError` for a path that is missing, of an
    unknown kind, or unreadable as a whole. A single row that cannot be parsed is yielded with its `problem`.
    """
    by_label: dict[str, Path] = {}
    sources = [
        [
            (file, label if by_label.setdefault(label, file) == file else str(file))
            for file, label in _expand(Path(path))
        ]
        for path in paths
    ]
    streams = [(record for file, label in files for record in _read_file(file, label)) for files in sources]
    if weights is None:
        for stream in streams:
            yield from stream
        return
    rng = random.Random(seed)
    while True:
        record = next(streams[rng.choices(range(len(streams)), weights)[0]], None)
        if record is None:
            return
        yield record


def _expand(path: Path) -> list[tuple[Path, str]]:
    """The data files under `path`, each with its label."""
    path, named = located(str(path))
    if path.is_file():
        return [(path, path.name)]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder{_nearest(path)}")
    if (path / "dataset_dict.json").exists():
        splits = sorted(item.parent.name for item in path.glob("*/state.json"))
        raise DataError(f"{path}: holds several splits; name one of them: {', '.join(str(path / s) for s in splits)}")
    if (path / "state.json").exists():
        return [(path / name, name) for name in _saved_files(path)]
    files = sorted(
        file.relative_to(path)
        for file in path.rglob("*")
        if data_suffix(file) in READERS and file.suffix != ".arrow" and not _is_other(file, path)
    )
    if not files:
        raise DataError(f"{path}: no data files in this folder; they end in {', '.join(sorted(READERS))}")
    if named is None:
        check_one_split(str(path), files)
    else:
        files = files_of_split(*named, files)
    return [(path / file, str(file)) for file in files]


def _is_other(file: Path, root: Path) -> bool:
    """Whether a file holds no rows: it is hidden, or only describes a dataset from a hub."""
    return file.name == "dataset_infos.json" or any(part.startswith(".") for part in file.relative_to(root).parts)


def _nearest(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _saved_files(path: Path) -> list[str]:
    """Names of the Arrow files of a saved `datasets` folder, in order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'state.json'}: not the state of a saved dataset: {error}") from None


def _read_file(file: Path, label: str) -> Iterator[Record]:
    reader = READERS.get(data_suffix(file))
    if reader is None:
        raise DataError(f"{file}: suffix {file.suffix!r}: must be one of {', '.join(sorted(READERS))}")
    try:
        for number, value, problem in reader(file):
            if not problem and not isinstance(value, dict):
                hint = (
                    "; if the file is one JSON list, name it .json" if isinstance(value, list) and number == 1 else ""
                )
                value, problem = {}, f"holds {type(value).__name__}, but must hold an object with named fields{hint}"
            yield Record(str(file), label, number, value, problem)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
