"""The report of a run: `write_report` makes one self-contained report.html from what the stages wrote down."""

from posttrain.report.write import write_report

__all__ = ["write_report"]
