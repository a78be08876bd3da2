"""Removes rows before the judge reads them: repetitions of earlier rows, and rows with text of evaluation sets.

Lines of removed.jsonl name each removed row, and the row that it repeats or the evaluation rows that it contains.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from posttrain.context import StageContext
from posttrain.data.arrays import ArrayWriter
from posttrain.data.contamination import EvaluationTexts
from posttrain.data.duplicates import DuplicateIndex
from posttrain.data.stored import StoreWriter, pick
from posttrain.errors import DataError
from posttrain.files import write_jsonl
from posttrain.filtering.config import FilterConfig
from posttrain.records import Row

FILE = "removed.jsonl"


def prune(rows: Sequence[Row], config: FilterConfig, context: StageContext) -> tuple[Sequence[Row], dict[str, int]]:
    """The remaining rows, and the number of removed rows by reason: {"num_duplicates", "num_contaminated"}.

    Without `dedup` and `decontaminate`: all rows, and no counts. Raises `DataError` for evaluation sets that cannot be
    read, and if no row remains.
    """
    if config.dedup is None and config.decontaminate is None:
        return rows, {}
    texts = EvaluationTexts(config.decontaminate) if config.decontaminate is not None else None
    stay = ArrayWriter("q")
    counts = {"num_duplicates": 0, "num_contaminated": 0}
    near = config.dedup.near if config.dedup is not None else None
    with DuplicateIndex(near) as index, StoreWriter[dict[str, Any]](dict[str, Any], context.dir) as removed:
        for place, row in enumerate(rows):
            context.progress(place + 1, len(rows), "rows compared")
            if texts is not None and (hits := texts.hits(row)):
                counts["num_contaminated"] += 1
                for hit in hits:
                    removed.append({"reason": "contaminated", **asdict(hit)})
            elif config.dedup is not None and (duplicate := index.find(row)) is not None:
                counts["num_duplicates"] += 1
                removed.append({"reason": "duplicate", **asdict(duplicate)})
            else:
                stay.append(place)
        if text := index.unsettled_text():
            context.event("duplicates_unsettled", rows=index.num_unsettled, text=text)
        write_jsonl(context.dir / FILE, removed.close())
    if not len(stay):
        raise DataError(f"all {len(rows)} rows contain text of decontaminate.path; see {context.dir / FILE}")
    return pick(rows, stay.close()), counts
