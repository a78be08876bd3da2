"""Readers of data files, one for each suffix. Each yields (row number, value, problem) for one row after another.

.jsonl and .ndjson, .json (a list of objects) and .csv may be compressed: .gz, .bz2, .xz, .zst. .parquet and .arrow (a
stream or a file) are read batch by batch.
"""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from posttrain.data.json_list import json_items
from posttrain.errors import DataError

CSV_FIELD_LIMIT = 1 << 27
BATCH, BATCH_BYTES = 256, 64 << 20  # most rows of a table, and most of their bytes, that are Python objects at a time
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Text of a JSON value that may hold what cannot be written again: surrogates, NaN, numbers beyond float64.
_DOUBTFUL = re.compile(r"\\u|NaN|Infinity|\d[eE]\+?\d{3}|\d{300}")
_COMPRESSED = (*_OPENERS, ".zst")


def data_suffix(file: Path) -> str:
    """The suffix of the data format, without the suffix of a compression: ".jsonl" for rows.jsonl.gz."""
    if file.suffix in _COMPRESSED and (inner := Path(file.stem).suffix) in (".jsonl", ".ndjson", ".json", ".csv"):
        return inner
    return file.suffix


def open_bytes(file: Path) -> BinaryIO:
    """Open a file for reading its decompressed bytes."""
    if file.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))  # pyright: ignore
    return _OPENERS.get(file.suffix, open)(file, "rb")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than any float64, so it cannot be written again")
    return number


def _parse_json(text: str) -> Any:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    if "\\u" in text and (problem := unwritable(value)):
        raise ValueError(problem)
    return value


def unwritable(value: object, name: str = "") -> str:
    """The error text for the first part of a value that cannot be written as JSON again; "" if there is none.

    name: the place of the value, such as messages[0].content, with which the text begins.
    """
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
    with open_bytes(file) as lines:
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
                hint = "; if the file is one JSON list, name it .json" if number == 1 and line[:1] == b"[" else ""
                yield number, {}, f"not JSON: {error}{hint}"


def _text_of(file: Path) -> TextIO:
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline="")


def _not_utf8(file: Path) -> DataError:
    """The error for a file that is not UTF-8, which names the first such line."""
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(f"{file}: line {number}: not UTF-8 (byte {line[error.start]:#04x}); convert the file")
    return DataError(f"{file}: not UTF-8; convert the file")


def _read_json(file: Path) -> Iterator[Parsed]:
    try:
        with _text_of(file) as text:
            for number, (row, own) in enumerate(json_items(text), 1):
                problem = unwritable(row) if _DOUBTFUL.search(own) else ""
                yield number, {} if problem else row, problem
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    except RecursionError as error:
        raise DataError(f"{file}: not JSON: {error}") from None


def _read_csv(file: Path) -> Iterator[Parsed]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    number = 0
    with _text_of(file) as text:
        reader = csv.DictReader(text, strict=True)
        try:
            names = list(reader.fieldnames or ())
        except UnicodeDecodeError:
            raise _not_utf8(file) from None
        except csv.Error as error:
            raise DataError(f"{file}: the header is not CSV: {error}") from None
        if problem := _header_problem(names):
            raise DataError(f"{file}: {problem}")
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                raise _not_utf8(file) from None
            except csv.Error as error:
                raise DataError(f"{file}: row {number}: not CSV: {error}") from None
            if None in row or None in row.values():
                yield number, {}, f"does not have the header's {len(names)} columns"
            else:
                yield number, {name: _cell(value) for name, value in row.items() if value != ""}, ""


def _header_problem(names: list[str]) -> str:
    """The error text for a header that names two columns alike, or that is not divided by commas."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"two columns of the header are named {twice!r}; rename one"
    sign = next((sign for sign in (";", "\t", "|") if len(names) == 1 and sign in names[0]), None)
    return f"the header is divided by {sign!r}; columns of CSV are divided by commas" if sign else ""


def _cell(value: str) -> Any:
    """The value of a CSV cell. CSV has no lists, so a cell with the JSON text of a list of messages becomes that list.

    Any other text stays text.
    """
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
            yield from _batch_rows(table.iter_batches(batch_size=BATCH))
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole parquet file: {error}") from None


def _read_arrow(file: Path) -> Iterator[Parsed]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                table = pa.ipc.open_file(source)
                yield from _batch_rows(table.get_batch(index) for index in range(table.num_record_batches))
            else:
                source.seek(0)
                yield from _batch_rows(pa.ipc.open_stream(source))
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole Arrow file: {error}") from None


def _batch_rows(batches: Any) -> Iterator[Parsed]:
    number = 0
    for batch in batches:
        step = max(1, min(BATCH, BATCH_BYTES * len(batch) // max(1, batch.nbytes)))  # rows with pictures are large
        for row in (row for start in range(0, len(batch), step) for row in batch.slice(start, step).to_pylist()):
            number += 1
            # Tables written by pandas mark a missing value as NaN.
            row = {k: None if isinstance(v, float) and math.isnan(v) else _without_nulls(v) for k, v in row.items()}
            row = {k: _as_data_urls(v) for k, v in row.items()}
            problem = unwritable(row)
            yield number, {} if problem else row, problem


def _without_nulls(value: object) -> Any:
    """A value without the keys that are null: in a table every object of a column has the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_data_urls(value: object) -> Any:
    """A value in which a picture of Hugging Face's form, {"bytes", "path"}, is a data URL, which JSON can hold."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and value.keys() <= {"bytes", "path"}:
            return "data:;base64," + base64.b64encode(value["bytes"]).decode()
        return {key: _as_data_urls(item) for key, item in value.items()}
    return [_as_data_urls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Parsed]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
