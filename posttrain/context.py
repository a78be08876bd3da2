"""The context of a stage: its folder, its seed, and the methods by which it reports events, progress and metrics.

Events are appended to the run's `events.jsonl`. The live display and the report read them from there, so a stage never
prints.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.files import append_jsonl, utc_now

PROGRESS_INTERVAL_S = 0.5


@dataclass
class StageContext:
    """The context of one stage in one run.

    name: the stage's name. dir: its folder, which must exist. events: the path of the run's events.jsonl. seed: of this
    stage. warm_engines: True if idle vLLM engines are kept for the next stage with the same engine settings.

    Example: StageContext("filter", Path("runs/mine/filter"), Path("runs/mine/events.jsonl"), seed=0)
    """

    name: str
    dir: Path
    events: Path
    seed: int = 0
    warm_engines: bool = False
    _last_progress: float = field(default=0.0, repr=False)

    @property
    def run_dir(self) -> Path:
        """The run directory. Files here are kept when a change of the config empties the stage's own folder."""
        return self.events.parent

    def event(self, event: str, **fields: object) -> None:
        """Append an event to events.jsonl. event: its name. fields: values that JSON can hold."""
        append_jsonl(self.events, {"time": utc_now(), "t": time.time(), "stage": self.name, "event": event, **fields})

    def busy(self, actor: str, what: str, *, start: float, end: float) -> None:
        """Append an event about work: `actor` did `what` between two Unix times.

        The timeline of the report shows it.
        """
        self.event("busy", actor=actor, what=what, start=start, end=end)

    def phase(self, phase: str) -> None:
        """Report what the stage is doing while it has no steps to count, such as "starting 2 engines"."""
        self.event("phase", phase=phase)

    def progress(
        self, done: float, total: float, unit: str, *, values: Mapping[str, float | str] | None = None
    ) -> None:
        """Append an event about the stage's progress. Calls within half a second of another are dropped.

        The last call, with done equal to total, is always written. done, total: numbers of `unit`, such as steps.
        values: figures to show beside them, such as the loss.
        """
        now = time.time()
        if done < total and now - self._last_progress < PROGRESS_INTERVAL_S:
            return
        self._last_progress = now
        self.event("progress", done=done, total=total, unit=unit, values=dict(values or {}))

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Append one line to the stage's metrics.jsonl. values: JSON values by name."""
        append_jsonl(self.dir / "metrics.jsonl", {"step": step, "t": time.time(), **values})


MERGE_GAP_S = 0.02
FLUSH_S = 5.0


class BusyLog:
    """Merges the busy intervals of one actor and one activity into longer ones, so that the events stay few."""

    def __init__(self, context: StageContext, actor: str, what: str):
        self._context = context
        self._actor = actor
        self._what = what
        self._start: float | None = None
        self._end = 0.0
        self.total_s = 0.0

    def add(self, start: float, end: float) -> None:
        """Add an interval of Unix times. Intervals must come roughly in the order of their ends."""
        if self._start is not None and (start > self._end + MERGE_GAP_S or self._end - self._start > FLUSH_S):
            start = max(start, self._end)
            self.flush()
        if self._start is None:
            self._start, self._end = start, max(start, end)
        else:
            self._start, self._end = min(self._start, start), max(self._end, end)

    @property
    def busy_s(self) -> float:
        """The total seconds of all intervals so far."""
        return self.total_s + (max(0.0, self._end - self._start) if self._start is not None else 0.0)

    def flush(self) -> None:
        """Append the event of the merged interval."""
        if self._start is not None and self._end > self._start:
            self.total_s += self._end - self._start
            self._context.busy(self._actor, self._what, start=self._start, end=self._end)
        self._start = None
