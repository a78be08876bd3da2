"""The four kinds of dataset, and one function that reads any of them item by item.

`supervised` rows end with an assistant turn, `prompt` rows with a user or tool turn. `pairs` prefer one reply to
another. `labelled` replies are marked as good or bad, as in datasets for KTO.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from posttrain.data.bad_rows import BadRow
from posttrain.data.files import read_records
from posttrain.data.formats import renamed
from posttrain.data.images.take import ImageReader
from posttrain.data.messages import RowError
from posttrain.data.ngrams import Item
from posttrain.data.pairs import Pair, is_labelled, labelled_to_json, pair_to_json, scan_pairs
from posttrain.data.rows import Data, as_config, iter_rows, row_to_json
from posttrain.errors import DataError
from posttrain.records import Row

DataKind = Literal["supervised", "prompt", "pairs", "labelled"]


def kind_of(data: Data) -> DataKind:
    """The kind of a dataset, judged by its first row. Raises `DataError` for a dataset without rows."""
    config = as_config(data)
    paths = [config.path] if isinstance(config.path, str) else config.path
    first = next(read_records(paths), None)
    if first is None:
        raise DataError(f"{', '.join(paths)}: holds no rows; at least one is needed")
    try:
        value: Mapping[str, Any] = renamed(first.value, config)
    except RowError:
        value = first.value
    if value.get("chosen") is not None and value.get("rejected") is not None:
        return "pairs"
    if is_labelled(value, config.format):
        return "labelled"
    good = next(iter_rows(data, kind="supervised", limit=1), None)
    if isinstance(good, BadRow) and not isinstance(next(iter_rows(data, kind="prompt", limit=1)), BadRow):
        return "prompt"
    return "supervised"


def iter_items(data: Data, kind: DataKind, images: ImageReader | None = None) -> Iterator[Item | BadRow]:
    """The items of a dataset one by one, a bad one as a `BadRow`. Only the ids of the items read so far are kept.

    images: takes their pictures; None leaves items as they are.
    """
    if kind in ("pairs", "labelled"):
        return scan_pairs(data, images)
    return iter_rows(data, kind="prompt" if kind == "prompt" else "supervised", images=images)


def item_to_json(item: Item) -> dict[str, Any]:
    """The item as a JSON object, which the readers turn into an equal item."""
    if isinstance(item, Row):
        return row_to_json(item)
    return pair_to_json(item) if isinstance(item, Pair) else labelled_to_json(item)
