"""The stage `filter`: a judge rates how hard each supervised row is, and the hardest rows are kept.

config.py      the keys
pruning.py     removes duplicates and text of evaluation sets before the judge reads them
rating.py      the verdict on each row, from an earlier run or from the judge
selection.py   chooses the rows to keep
stage.py       the stage: rows in, kept.jsonl and dropped.jsonl out

Public names are imported when they are first used, so that importing this package loads neither Ray nor torch.
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.filtering.config import FilterConfig
    from posttrain.filtering.selection import select
    from posttrain.filtering.stage import FilterResult, filter_rows

__all__ = ["FilterConfig", "FilterResult", "filter_rows", "select"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"config": ["FilterConfig"], "selection": ["select"], "stage": ["FilterResult", "filter_rows"]},
)
