"""Reads datasets into validated rows, and names every bad row before any model is loaded.

There are two kinds of row: a `supervised` row ends with an assistant turn, a `prompt` row with a user or tool turn.
messages.py reads single messages, turns.py checks their order, chat.py and samples.py make tokens. Rows are never
repaired: a bad row is an error that names its file and number, or is set aside where the config says so (bad_rows.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from posttrain.config.data import DataConfig
from posttrain.context import StageContext
from posttrain.data.bad_rows import BadRow, BadRows, SeenIds, summary
from posttrain.data.files import Record, read_records
from posttrain.data.formats import renamed, take_conversation
from posttrain.data.images.take import ImageReader
from posttrain.data.messages import TEXT_ROLE, RowError, messages_to_json, shown
from posttrain.data.stored import Stored, StoreWriter
from posttrain.data.turns import Kind, check_turns, check_usable
from posttrain.errors import DataError
from posttrain.files import write_jsonl
from posttrain.records import Row

Data = DataConfig | str | Path | Sequence[str | Path]
T = TypeVar("T")
Item = TypeVar("Item", contravariant=True)


def load_rows(
    data: Data, *, kind: Kind, limit: int | None = None, stage: str | None = None, context: StageContext | None = None,
    images: ImageReader | None = None,
) -> list[Row]:  # fmt: skip
    """Read and validate a dataset. Returns at least one row.

    data: a `DataConfig`, a path, or several paths. kind: `supervised` rows must end with an assistant turn, `prompt`
    rows with a user or tool turn. limit: use only the first rows (the smaller of this and `data.limit`). stage: the
    kind of stage that reads, named in the error about rows that it cannot use yet (images). context: of the stage,
    which is told about rows that are set aside. images: puts the pictures of the rows into its store, so that image
    parts hold keys; None leaves rows as they are. Raises `DataError` that names file, row number, the value got and the
    rule, for the first few bad rows.
    """
    rows: list[Row] = []
    collect(data, _parser(kind, stage, images), rows, limit=limit, identity=lambda row: row.id, context=context)
    return rows


def store_rows(
    data: Data, *, kind: Kind, stage: str, context: StageContext | None = None, images: ImageReader | None = None
) -> Stored[Row]:
    """As `load_rows`, for a stage: the rows lie in a file on disk, so that memory does not grow with their number."""
    with StoreWriter[Row](Row, context and context.dir) as rows:
        collect(data, _parser(kind, stage, images), rows, identity=lambda row: row.id, context=context)
        return rows.close()


def iter_rows(
    data: Data, *, kind: Kind, limit: int | None = None, images: ImageReader | None = None
) -> Iterator[Row | BadRow]:
    """The rows of a dataset one by one, a bad one as a `BadRow`. Only the ids of the rows read so far are kept.

    images: as for `load_rows`.
    """
    return scan(data, _parser(kind, None, images), limit, identity=lambda row: row.id)


def check_data(
    data: Data, kind: Kind, rows: int = 100, *, stage: str | None = None, images: ImageReader | None = None
) -> list[str]:
    """Problems in the first `rows` rows of a dataset, one line each. images: as for `load_rows`.

    A path that refers to the output of another stage (`${...}`) does not exist yet, so nothing is checked.
    """
    return check(data, _parser(kind, stage, images), rows, identity=lambda row: row.id)


def _parser(kind: Kind, stage: str | None, images: ImageReader | None = None) -> Callable[[Record, DataConfig], Row]:
    def parse(record: Record, config: DataConfig) -> Row:
        row = parse_row(record, kind, config)
        if images is not None:
            row = images.take(row, Path(record.file).parent)
        if stage is not None:
            check_usable(row.messages, row.fields, name="messages", stage=stage, images=images is not None)
        return row

    return parse


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, atomically, with all their columns. Returns the number of rows."""
    return write_jsonl(path, (row_to_json(row) for row in rows))


def row_to_json(row: Row) -> dict[str, Any]:
    """The JSON object that `load_rows` reads back as an equal row."""
    record: dict[str, Any] = {"id": row.id, "capability": row.capability}
    if row.messages[0].role == TEXT_ROLE:
        record["text"] = row.messages[0].text
    else:
        record["messages"] = messages_to_json(row.messages)
    if row.answer is not None:
        record["answer"] = row.answer
    return {**row.fields, **record}


# --- the scan that rows and pairs share ---


def as_config(data: Data) -> DataConfig:
    """`data` as a `DataConfig`."""
    if isinstance(data, DataConfig):
        return data
    if isinstance(data, str | Path):
        return DataConfig(path=str(data))
    return DataConfig(path=[str(path) for path in data])


def scan(
    data: Data, parse: Callable[[Record, DataConfig], T], limit: int | None, *, identity: Callable[[T], str]
) -> Iterator[T | BadRow]:
    """Yield each row of a dataset, parsed by `parse`, or a `BadRow`. Only the ids of the rows read so far are kept.

    identity: gives the id of a parsed row; a second row with the same id is bad.
    """
    config = as_config(data)
    paths = [config.path] if isinstance(config.path, str) else config.path
    limits = [value for value in (limit, config.limit) if value is not None]
    seen = SeenIds()
    for record in islice(read_records(paths, config.weights, config.mix_seed), min(limits, default=None)):
        try:
            if record.problem:
                raise RowError(record.problem)
            row = parse(record, config)
            name = identity(row)
            if (earlier := seen.add(name, record.where)) is not None:
                raise RowError(f"id {name!r}: already used by {earlier}; every id must be unique")
        except RowError as error:
            yield BadRow(record, str(error))
        else:
            yield row


class Sink(Protocol[Item]):
    """Takes the rows of a dataset: a list, or a file."""

    def append(self, record: Item, /) -> None:
        """Add a row."""
        ...

    def __len__(self) -> int: ...


def collect(
    data: Data, parse: Callable[[Record, DataConfig], T], rows: "Sink[T]", *,
    identity: Callable[[T], str], limit: int | None = None, context: StageContext | None = None,
) -> None:  # fmt: skip
    """Add all rows of a dataset to `rows`.

    Raises `DataError` if there is no good row, or any bad row under `on_bad_row: fail`.
    """
    config = as_config(data)
    if context is not None:
        context.phase(f"reading {shown_path(data)}")
    with BadRows(context, keep=config.on_bad_row == "set_aside") as bad:
        for item in scan(data, parse, limit, identity=identity):
            if isinstance(item, BadRow):
                bad.append(item)
            else:
                rows.append(item)
        if len(bad) and (config.on_bad_row == "fail" or not len(rows)):
            raise DataError("\n".join(bad.summary()))
        if not len(rows):
            raise DataError(f"{shown_path(data)}: holds no rows; at least one is needed")
        if len(bad):
            bad.set_aside(len(rows) + len(bad))


def check(
    data: Data, parse: Callable[[Record, DataConfig], T], rows: int, *, identity: Callable[[T], str]
) -> list[str]:
    """Problems in the first `rows` rows, one line each."""
    if "${" in shown_path(data):
        return []
    try:
        found = list(scan(data, parse, rows + 1, identity=identity))
    except DataError as error:
        return str(error).splitlines()
    if not found:
        return [f"{shown_path(data)}: holds no rows; at least one is needed"]
    within = rows if len(found) > rows else None
    bad = [str(item) for item in found[:rows] if isinstance(item, BadRow)]
    return [] if as_config(data).on_bad_row == "set_aside" and len(bad) < len(found[:rows]) else summary(bad, within)


def shown_path(data: Data) -> str:
    """The paths of a dataset, for messages."""
    path = as_config(data).path
    return path if isinstance(path, str) else ", ".join(path)


# --- one row ---


def parse_row(record: Record, kind: Kind, config: DataConfig) -> Row:
    """Make a `Row` of one record. Raises `RowError`."""
    value = renamed(record.value, config)
    messages = take_conversation(value, kind, config)
    check_turns(messages, "messages", kind)
    return Row(
        id=take_id(value, record),
        capability=take_capability(value, config.capability),
        messages=messages,
        answer=value.pop("answer", None),
        fields=value,
    )


def take_id(value: dict[str, Any], record: Record) -> str:
    """Remove and return the row's id; if it has none, an id made of the file's name and the row number."""
    identity = value.pop("id", None)
    if identity is None:
        return f"{record.label}:{record.number}"
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise RowError(f"id: got {shown(identity)}: must be text or a whole number")
    return str(identity)


def take_capability(value: dict[str, Any], default: str) -> str:
    """Remove and return the row's capability; if it has none, `default`, which is the dataset's."""
    capability = value.pop("capability", None)
    if capability is None:
        return default
    if not isinstance(capability, str) or not capability.strip():
        raise RowError(f"capability: got {shown(capability)}: must be a name")
    return capability
