"""Raw records of a dataset, in order, each with the file and the row number it came from.

Formats by suffix: .jsonl, .json (a list of objects), .parquet, .csv; a folder of them; a folder saved by
`datasets.save_to_disk`, whose Arrow files are read directly (the `datasets` package is never imported: this also
runs while a config is validated). Left out, on purpose: downloading, compressed files, other encodings than UTF-8.
"""

import csv
import difflib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

CSV_FIELD_LIMIT = 1 << 27


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
        return f"{self.file}: row {self.number}"


def read_records(paths: Sequence[str | Path]) -> Iterator[Record]:
    """Yield the records of files and folders, in the order given (files of a folder by name).

    Raises `DataError` for a path that is missing, of an unknown kind, or unreadable as a whole. A single row that
    cannot be parsed is yielded with its `problem`.
    """
    files = [item for path in paths for item in _expand(Path(path).expanduser())]
    by_label: dict[str, Path] = {}
    for file, label in files:
        if by_label.setdefault(label, file) != file:
            label = str(file)
        yield from _read_file(file, label)


def _expand(path: Path) -> list[tuple[Path, str]]:
    """The data files under `path`, each with its label."""
    if path.is_file():
        return [(path, path.name)]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder{_nearest(path)}")
    if (path / "dataset_dict.json").exists():
        splits = sorted(item.parent.name for item in path.glob("*/state.json"))
        raise DataError(f"{path}: holds several splits; name one of them: {', '.join(str(path / s) for s in splits)}")
    if (path / "state.json").exists():
        return [(path / name, name) for name in _saved_files(path)]
    files = sorted(f for f in path.rglob("*") if f.suffix in READERS and f.suffix != ".arrow" and not _hidden(f, path))
    if not files:
        raise DataError(f"{path}: no data files in this folder; they end in {', '.join(sorted(READERS))}")
    return [(file, str(file.relative_to(path))) for file in files]


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


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
    reader = READERS.get(file.suffix)
    if reader is None:
        raise DataError(f"{file}: suffix {file.suffix!r}: must be one of {', '.join(sorted(READERS))}")
    try:
        for number, value, problem in reader(file):
            if not problem and not isinstance(value, dict):
                value, problem = {}, f"holds {type(value).__name__}, but must hold an object with named fields"
            yield Record(str(file), label, number, value, problem)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than any number that can be written again")
    return number


def _parse_json(text: str) -> Any:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    if "\\u" in text and (problem := unwritable(value)):
        raise ValueError(problem)
    return value


def unwritable(value: Any, name: str = "") -> str:
    """What in a value could not be written as JSON again, and where; "" if all can."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{name}: character {error.start + 1} is half of a surrogate pair, which is not text"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{name}: got {value}, which JSON cannot hold"
    elif isinstance(value, bytes):
        return f"{name}: holds bytes, which JSON cannot hold; remove the column, or write it as text"
    elif isinstance(value, dict):
        parts = ((key, f"{name}.{key}" if name else str(key)) for key in value)
        return next(
            (problem for key, at in parts if (problem := unwritable(key, at) or unwritable(value[key], at))), ""
        )
    elif isinstance(value, list):
        return next((problem for at, item in enumerate(value) if (problem := unwritable(item, f"{name}[{at}]"))), "")
    return ""


Parsed = tuple[int, Any, str]


def _read_jsonl(file: Path) -> Iterator[Parsed]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, _parse_json(line.decode("utf-8")), ""
            except UnicodeDecodeError as error:
                yield number, {}, f"not UTF-8 (byte {line[error.start]:#04x} at position {error.start + 1})"
            except (ValueError, RecursionError) as error:
                yield number, {}, f"not JSON: {error}"


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}: line {row}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from None


def _read_json(file: Path) -> Iterator[Parsed]:
    try:
        rows = _parse_json(_read_text(file))
    except (ValueError, RecursionError) as error:
        hint = "; if it is JSON lines, name it .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{file}: not JSON: {error}{hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: holds {type(rows).__name__}, but must hold a list of objects")
    for number, row in enumerate(rows, 1):
        yield number, row, ""


def _read_csv(file: Path) -> Iterator[Parsed]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}: row {number}: not CSV: {error}") from None
        width = len(reader.fieldnames or ())
        if None in row or None in row.values():
            yield number, {}, f"does not have the header's {width} columns"
        else:
            yield number, {name: _cell(value) for name, value in row.items() if value != ""}, ""


def _cell(value: str) -> Any:
    """CSV has no lists: a cell that holds a JSON list of messages is one. Any other text stays text."""
    if not value.lstrip().startswith("[{"):
        return value
    try:
        found = _parse_json(value)
    except (ValueError, RecursionError):
        return value
    is_turns = all(isinstance(item, dict) and ("role" in item or "from" in item) for item in found)
    return found if is_turns else value


def _read_parquet(file: Path) -> Iterator[Parsed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield from _batch_rows(table.iter_batches(batch_size=1024))
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole parquet file: {error}") from None


def _read_arrow(file: Path) -> Iterator[Parsed]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            yield from _batch_rows(stream)
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole Arrow stream: {error}") from None


def _batch_rows(batches: Any) -> Iterator[Parsed]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            # Tables written by pandas mark a missing value as NaN.
            row = {k: None if isinstance(v, float) and math.isnan(v) else _without_nulls(v) for k, v in row.items()}
            yield number, row, unwritable(row)


def _without_nulls(value: Any) -> Any:
    """A value without the keys that a table adds to its objects, as null, because others of the column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Parsed]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
