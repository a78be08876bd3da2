"""A judge rates how hard each supervised row is; the hardest stay.

`filter_rows`, `select`, `FilterResult` and `FilterConfig` are handed on when first asked for, so that importing this
package loads neither Ray nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.filtering.config import FilterConfig
    from posttrain.filtering.selection import select
    from posttrain.filtering.stage import FilterResult, filter_rows

__all__ = ["FilterConfig", "FilterResult", "filter_rows", "select"]

_HOMES = {"FilterConfig": "config", "FilterResult": "stage", "filter_rows": "stage", "select": "selection"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
