"""The report of a run: `write_report` makes one self-contained report.html from what the stages wrote down."""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.report.write import write_report

__all__ = ["write_report"]

__getattr__, __dir__ = lazy_names(__name__, {"write": ["write_report"]})
