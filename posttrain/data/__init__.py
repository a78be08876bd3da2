"""Read and validate rows; render chat. Public names are imported when they are first used."""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.data.pairs import Pair, load_pairs, write_pairs
    from posttrain.data.rows import check_data, load_rows, write_rows

__all__ = ["Pair", "check_data", "load_pairs", "load_rows", "write_pairs", "write_rows"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"rows": ["check_data", "load_rows", "write_rows"], "pairs": ["Pair", "load_pairs", "write_pairs"]},
)
