"""Read and validate rows; render chat. Public names are handed on when they are first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data.pairs import Pair, load_pairs, write_pairs
    from posttrain.data.rows import check_data, load_rows, write_rows

__all__ = ["Pair", "check_data", "load_pairs", "load_rows", "write_pairs", "write_rows"]


def __getattr__(name: str) -> Any:
    if name in ("check_data", "load_rows", "write_rows"):
        from posttrain.data import rows

        return getattr(rows, name)
    if name in ("Pair", "load_pairs", "write_pairs"):
        from posttrain.data import pairs

        return getattr(pairs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
