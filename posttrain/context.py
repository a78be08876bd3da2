"""What a stage is given to work with: its folder, its seed, and how it tells the world what it is doing.

Events go to `events.jsonl` of the run, from which the live display and the report are made: a stage never prints.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.files import append_jsonl, utc_now

PROGRESS_INTERVAL_S = 0.5


@dataclass
class StageContext:
    """One stage of one run.

    name: the stage's name; dir: its folder, which exists; events: the run's events.jsonl; seed: of this stage.
    warm_engines: keep vLLM engines of the same shape alive between stages.
    """

    name: str
    dir: Path
    events: Path
    seed: int = 0
    warm_engines: bool = False
    _last_progress: float = field(default=0.0, repr=False)

    @property
    def run_dir(self) -> Path:
        """The run directory. What a stage keeps here outlives its own folder, which a change of its config empties."""
        return self.events.parent

    def event(self, event: str, **fields: object) -> None:
        """Record that something happened. `fields` must be JSON."""
        append_jsonl(self.events, {"time": utc_now(), "t": time.time(), "stage": self.name, "event": event, **fields})

    def busy(self, actor: str, what: str, *, start: float, end: float) -> None:
        """Record that `actor` did `what` between two Unix times, for the timeline."""
        self.event("busy", actor=actor, what=what, start=start, end=end)

    def phase(self, phase: str) -> None:
        """Say what the stage does while there is no progress to count, such as "starting 2 engines"."""
        self.event("phase", phase=phase)

    def progress(
        self, done: float, total: float, unit: str, *, values: Mapping[str, float | str] | None = None
    ) -> None:
        """Write an event that says how far the stage is. Calls within half a second of another are dropped.

        The last call, with done equal to total, is always written.
        done, total: in `unit`, such as steps. values: figures to show beside them, such as the loss.
        """
        now = time.time()
        if done < total and now - self._last_progress < PROGRESS_INTERVAL_S:
            return
        self._last_progress = now
        self.event("progress", done=done, total=total, unit=unit, values=dict(values or {}))

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Append one line to the stage's metrics.jsonl."""
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
        """Seconds of everything merged so far."""
        return self.total_s + (max(0.0, self._end - self._start) if self._start is not None else 0.0)

    def flush(self) -> None:
        """Write the event of what is merged so far."""
        if self._start is not None and self._end > self._start:
            self.total_s += self._end - self._start
            self._context.busy(self._actor, self._what, start=self._start, end=self._end)
        self._start = None
