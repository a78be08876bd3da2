"""The report of a run: `write_report` makes one self-contained report.html from the files of the run directory.

write.py     reads the run, builds the sections, fills page.html.jinja (with page.css and page.js)
read.py      the run directory as one record; series.py: the columns of a metrics.jsonl
lineage.py   which model each evaluation measured; statements.py: sentences about accuracies before and after
blocks.py    what sections consist of; charts.py, format.py: plotly figures and numbers in one style
busy.py      how much sampling and training ran at the same time
sections/    one file for each section of the page
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.report.write import write_report

__all__ = ["write_report"]

__getattr__, __dir__ = lazy_names(__name__, {"write": ["write_report"]})
