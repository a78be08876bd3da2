"""The counts of `posttrain data inspect`: formats, capabilities, lengths, exact duplicates and problems of a dataset.

Rows are counted one by one; of each a length and hashes of its id and its content are kept, on disk.
Left out: near-duplicates (duplicates.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.data.arrays import ArrayWriter
from posttrain.data.bad_rows import MAX_SHOWN_PROBLEMS, BadRow, SeenIds
from posttrain.data.duplicates import digest
from posttrain.data.files import read_records
from posttrain.data.formats import detect, renamed
from posttrain.data.images.render import pictures_of
from posttrain.data.images.take import ImageReader
from posttrain.data.kinds import DataKind, iter_items
from posttrain.data.labelled import Labelled
from posttrain.data.messages import RowError
from posttrain.data.pairs import pair_format
from posttrain.data.rows import Data, as_config, shown_path
from posttrain.data.turns import tools_of
from posttrain.errors import DataError
from posttrain.records import Row

if TYPE_CHECKING:
    from posttrain.data.arrays import Array

BINS = 10


def inspect(
    data: Data,
    kind: DataKind,
    length: Callable[[Any], int],
    *,
    max_length: int | None = None,
    images: ImageReader | None = None,
) -> dict[str, Any]:
    """Counts of a dataset as a JSON object. images: takes the pictures of rows, which are then counted, too.

    length: gives the length of a row, pair or labelled reply, in tokens or characters as the caller likes. max_length:
    in the same unit; `over_max_length` is the share of rows that are longer, None without it. Rows that `length`
    cannot measure are counted as bad. Raises `DataError` for a dataset that cannot be read.
    """
    config = as_config(data)
    formats = _formats(data, kind)
    labels: Counter[str] = Counter()
    capabilities: Counter[str] = Counter()
    lengths, seen = ArrayWriter("q"), SeenIds(named=0)
    problems: list[str] = []
    pictures: Counter[int] = Counter()
    bad = duplicates = 0
    for item in iter_items(data, kind, images):
        if isinstance(item, BadRow):
            bad += 1
            problems += [str(item)] if len(problems) < MAX_SHOWN_PROBLEMS else []
            continue
        try:
            tools_of(item.fields)
            lengths.append(length(item))
        except (DataError, RowError) as error:
            bad += 1
            problems += [f"row {item.id!r}: {error}"] if len(problems) < MAX_SHOWN_PROBLEMS else []
            continue
        capabilities[item.capability] += 1
        pictures[len(pictures_of(item.messages if isinstance(item, Row) else item.prompt))] += 1
        duplicates += seen.add(digest(item).hex(), "") is not None
        labels += Counter([("false", "true")[item.good]] if isinstance(item, Labelled) else [])
    if not len(lengths) and not bad:
        raise DataError(f"{shown_path(data)}: holds no rows; at least one is needed")
    ordered = lengths.close()
    ordered.sort()
    by_pictures = {str(number): count for number, count in sorted(pictures.items())} if any(pictures) else {}
    longer = len(ordered) - int(ordered.searchsorted(max_length or 0, "right"))
    over = None if max_length is None or not len(ordered) else longer / len(ordered)
    return {
        "path": config.path, "kind": kind, "rows": len(ordered), "bad_rows": bad, "duplicates": duplicates,
        "formats": dict(formats), "labels": dict(labels), "capabilities": dict(capabilities.most_common()),
        "pictures": by_pictures,
        "lengths": _figures(ordered), "histogram": _histogram(ordered), "over_max_length": over, "problems": problems,
    }  # fmt: skip


def _formats(data: Data, kind: DataKind) -> Counter[str]:
    config = as_config(data)
    paths = [config.path] if isinstance(config.path, str) else config.path
    found: Counter[str] = Counter()
    for record in read_records(paths):
        try:
            found[_format(renamed(record.value, config), config.format, kind)] += 1
        except RowError:
            found["unknown"] += 1
    return found


def _format(value: Mapping[str, Any], declared: str | None, kind: DataKind) -> str:
    if kind in ("pairs", "labelled"):
        return pair_format(value, declared)
    return declared or detect(value, "prompt" if kind == "prompt" else "supervised")


def _figures(ordered: "Array") -> dict[str, int]:
    if not len(ordered):
        return {}
    last = len(ordered) - 1
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: int(ordered[round(share * last)]) for name, share in shares.items()} | {"sum": int(ordered.sum())}


def _histogram(ordered: "Array") -> list[list[int]]:
    """[first length, last length, number of rows] of at most `BINS` bins of equal width."""
    if not len(ordered):
        return []
    width = int(ordered[-1]) // BINS + 1
    ends = ordered.searchsorted([at * width for at in range(BINS + 1)]).tolist()
    found = zip(range(BINS), ends, ends[1:], strict=False)
    return [[at * width, (at + 1) * width - 1, end - start] for at, start, end in found if start < len(ordered)]
