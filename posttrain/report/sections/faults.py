"""Faults and recoveries: what went wrong during the run and how it was handled. Left out if nothing went wrong."""

from collections import Counter
from datetime import UTC, datetime

from posttrain.metrics.faults import fault_words
from posttrain.report.blocks import Section, Table
from posttrain.report.format import plural
from posttrain.report.read import Run, number

MAX_ROWS = 100


def faults_section(run: Run) -> Section | None:
    """A table of the faults, oldest first. If there are very many, only the last are shown."""
    found = [(event, words) for event in run.events if (words := fault_words(event))]
    if not found:
        return None
    shown = found[-MAX_ROWS:]
    rows = [(_clock(event.get("t")), str(event.get("stage") or ""), what, details) for event, (what, details) in shown]
    kinds = Counter(what for _, (what, _) in found)
    lead = f"{plural(len(found), 'event')}: {', '.join(f'{what} {n}' for what, n in kinds.items())}."
    if len(shown) < len(found):
        lead += f" The last {MAX_ROWS} are shown."
    return Section("faults", "Faults and recoveries", [Table(("UTC", "stage", "what", "details"), rows)], [lead])


def _clock(value: object) -> str:
    moment = number(value)
    return "" if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%-d %b %H:%M:%S")
