"""What a stage is given to work with: its folder, its seed, and how it tells the world what it is doing.

Events go to `events.jsonl` of the run, from which the live display and the report are made: a stage never prints.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.metrics.jsonl import append_jsonl, utc_now

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

    def event(self, event: str, **fields: Any) -> None:
        """Record that something happened. `fields` must be JSON."""
        append_jsonl(self.events, {"time": utc_now(), "t": time.time(), "stage": self.name, "event": event, **fields})

    def busy(self, actor: str, what: str, start: float, end: float) -> None:
        """Record that `actor` did `what` between two Unix times, for the timeline."""
        self.event("busy", actor=actor, what=what, start=start, end=end)

    def progress(self, done: float, total: float, unit: str, values: Mapping[str, float | str] | None = None) -> None:
        """Say how far the stage is. Calls closer together than half a second are dropped, but never the last one."""
        now = time.time()
        if done < total and now - self._last_progress < PROGRESS_INTERVAL_S:
            return
        self._last_progress = now
        self.event("progress", done=done, total=total, unit=unit, values=dict(values or {}))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to the stage's metrics.jsonl."""
        append_jsonl(self.dir / "metrics.jsonl", {"step": step, "t": time.time(), **values})


class QuietContext(StageContext):
    """What every rank but the first is given: it has the stage's folder and seed, and says nothing."""

    @classmethod
    def of(cls, context: StageContext) -> "QuietContext":
        """The quiet one of a stage."""
        return cls(context.name, context.dir, context.events, context.seed, context.warm_engines)

    def event(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""
