"""Shows a run while it goes on: a live table of stages and an RL panel on a terminal, plain lines anywhere else.

    events.jsonl ─► NewRecords ─┬─► RunState ─► LiveDisplay (rich) | PlainDisplay
    metrics.jsonl of RL ────────┘

Stages never print. The display reads everything from the run's files, so it cannot slow a stage down, and it shows a
resumed run as well. Charts over time are left to the report.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from posttrain.cli.outcome import notice_text, outcome_lines
from posttrain.cli.rl_panel import rl_panel
from posttrain.files import NewRecords
from posttrain.metrics.faults import fault_words
from posttrain.metrics.tail import NewLines
from posttrain.report.read import read_config, setting

PLAIN_INTERVAL_S = 10.0


@dataclass
class StageState:
    """The state of one stage. values: of its last progress event. metrics: of its last RL step, and of its last
    evaluation beside the training."""

    name: str
    kind: str
    status: str = "waiting"
    started: float = 0.0
    wall_s: float | None = None
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    phase: str = ""  # what the stage does while it has no steps to count, such as "reading data.jsonl"
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    unscored_limit: float | None = None  # reward.alarm_fraction, of an RL stage

    @property
    def seconds(self) -> float | None:
        """How long the stage has been running, or took, in seconds."""
        if self.status == "running":
            return max(time.time() - self.started, 0.0)
        return self.wall_s

    def take(self, event: dict[str, Any]) -> None:
        """Update the state from one event."""
        kind = event.get("event")
        if kind == "stage_start":
            self.status, self.started = "running", float(event.get("t") or time.time())
            self.note = "resumed" if event.get("resumed") else ""
        elif kind == "phase":
            self.phase = str(event.get("phase") or "")
        elif kind == "progress":
            self.phase = ""
            self.done, self.total = float(event.get("done") or 0), float(event.get("total") or 0)
            self.unit, self.values = str(event.get("unit") or ""), dict(event.get("values") or {})
        elif kind in ("stage_done", "stage_skipped", "stage_failed", "stage_interrupted"):
            self.status, self.wall_s = kind.removeprefix("stage_"), event.get("wall_s")
            self.note = str(event.get("error") or event.get("why") or "").split("\n")[0]


class RunState:
    """The state of every stage, updated from events."""

    def __init__(self, nodes: Sequence[tuple[str, str]], events: Path):
        self.stages = {name: StageState(name, kind) for name, kind in nodes}
        self.run_dir = events.parent
        self._tail = NewRecords(events, from_end=True)
        self._lines = {name: NewLines(events.parent / name / "metrics.jsonl") for name, kind in nodes if kind == "rl"}

    def update(self) -> Iterator[tuple[StageState, dict[str, Any]]]:
        """Read the new events. Yields each event of a stage together with the stage's state after it."""
        for name, lines in self._lines.items():
            stage = self.stages[name]
            for _, metrics in lines.read():
                stage.metrics = {**_of_evaluation(stage.metrics), **metrics}
        for event in self._tail.read():
            stage = self.stages.get(str(event.get("stage")))
            if stage:
                stage.take(event)
                if stage.kind == "rl" and event.get("event") == "stage_start":
                    config = read_config(self.run_dir / stage.name, [])
                    stage.unscored_limit = setting(config, "reward.alarm_fraction")
                yield stage, event


def _of_evaluation(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the latest evaluation beside the training found: its step alone has these figures."""
    return {name: value for name, value in metrics.items() if name.startswith("evaluation/")}


class PlainDisplay:
    """Prints a line with the time for each start, end, skip, fault and notice, and some lines for progress."""

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._state: RunState | None = None
        self._shown: dict[str, float] = {}

    def start(self, nodes: Sequence[tuple[str, str]], events: Path) -> None:
        """Begin to follow a run."""
        self._state = RunState(nodes, events)

    def refresh(self) -> None:
        """Print what is new."""
        for stage, event in self._state.update() if self._state else ():
            for line in filter(None, [self._line(stage, event), *end_lines(self._state, stage, event)]):
                print(dated(event, line), file=self._out, flush=True)

    def stop(self) -> None:
        """Print the rest."""
        self.refresh()

    def _line(self, stage: StageState, event: dict[str, Any]) -> str:
        kind, name = event.get("event"), stage.name
        if kind == "progress":
            now = time.monotonic()
            if stage.done < stage.total and now - self._shown.get(name, now - 2 * PLAIN_INTERVAL_S) < PLAIN_INTERVAL_S:
                return ""
            self._shown[name] = now
            return f"{name}  {progress_text(stage)}  {values_text(stage.values)}".rstrip()
        if kind == "phase":
            return f"{name}  {stage.phase}"
        if kind == "stage_start":
            return f"{name}  {'continues' if event.get('resumed') else 'starts'}"
        if kind == "stage_done":
            return f"{name}  done in {seconds_text(stage.wall_s)}"
        if kind == "stage_skipped":
            return f"{name}  skipped: {stage.note}"
        if kind in ("stage_failed", "stage_interrupted"):
            return f"{name}  {stage.status}" + (f": {stage.note}" if stage.note else "")
        return fault_text(name, event) or notice_text(name, event)


class LiveDisplay:
    """A table of stages that is redrawn in place, with a panel of figures for the running RL stage.

    Faults, notices and what each stage made are printed as lines above the table, and stay there.
    """

    def __init__(self, console: Any = None) -> None:
        self._console = console  # rich's; None: standard output
        self._state: RunState | None = None
        self._live: Any = None

    def start(self, nodes: Sequence[tuple[str, str]], events: Path) -> None:
        """Begin to follow a run."""
        from rich.live import Live

        self._state = RunState(nodes, events)
        self._live = Live(
            get_renderable=self._render, console=self._console, refresh_per_second=4, redirect_stderr=False
        )
        self._live.start()

    def refresh(self) -> None:
        """Read new events. rich redraws the table in a thread of its own."""
        for stage, event in self._state.update() if self._state else ():
            fault = fault_text(stage.name, event)
            style = "yellow" if fault else None
            for line in [fault or notice_text(stage.name, event), *end_lines(self._state, stage, event)]:
                if line and self._live:
                    self._live.console.print(dated(event, line), style=style, markup=False, highlight=False)

    def stop(self) -> None:
        """Draw a last time and leave the table on the screen."""
        self.refresh()
        if self._live:
            self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group

        stages = list(self._state.stages.values()) if self._state else []
        running = [stage for stage in stages if stage.kind == "rl" and stage.status == "running"]
        panels = [
            rl_panel(
                stage.name,
                stage.metrics,
                stage.phase or values_text(stage.values) or "no step yet",
                unscored_limit=stage.unscored_limit,
            )
            for stage in running
        ]
        return Group(_stage_table(stages), *panels)


STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "skipped": "dim green",
    "failed": "bold red",
    "interrupted": "yellow",
}


def _stage_table(stages: Sequence[StageState]) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "status", "time", "", ""):
        table.add_column(heading, header_style="dim", no_wrap=True, justify="right" if heading == "time" else "left")
    for stage in stages:
        style = STYLES.get(stage.status, "")
        running = stage.status == "running"
        bar = ProgressBar(total=stage.total, completed=stage.done, width=24) if running and stage.total else Text("")
        detail = stage.note
        if running and stage.phase:
            detail = stage.phase
        elif running and stage.total:
            figures = "" if stage.kind == "rl" else values_text(stage.values)  # RL has a panel of its own
            detail = f"{progress_text(stage)}  {figures}".rstrip()
        indent = "  " if "." in stage.name else ""
        name = indent + stage.name.rpartition(".")[2]
        table.add_row(
            Text(name, style), Text(stage.status, style), seconds_text(stage.seconds), bar, Text(detail, "dim")
        )
    return table


def dated(event: dict[str, Any], line: str) -> str:
    """A line with the local time of its event in front."""
    return f"{time.strftime('%H:%M:%S', time.localtime(float(event.get('t') or time.time())))}  {line}"


def end_lines(state: RunState | None, stage: StageState, event: dict[str, Any]) -> list[str]:
    """What a stage made, if this event is its end."""
    if state is None or event.get("event") not in ("stage_done", "stage_skipped"):
        return []
    return [f"{stage.name}  {line}" for line in outcome_lines(state.run_dir, stage.name, stage.kind)]


def fault_text(stage: str, event: dict[str, Any]) -> str:
    """The text of a fault, such as `rl  engine replaced: engine-0: its process ended`; "" for an event that is no
    fault.
    """
    words = fault_words(event)
    return "" if words is None else f"{stage}  {': '.join(part for part in words if part)}"


def progress_text(stage: StageState) -> str:
    """How far a stage is, such as `12/40 steps`."""
    return f"{stage.done:g}/{stage.total:g} {stage.unit}" if stage.total else ""


def values_text(values: dict[str, Any]) -> str:
    """Figures on one line, such as `reward 0.41 · staleness 1.2`."""
    return " · ".join(f"{key} {_short(value)}" for key, value in values.items())


def seconds_text(seconds: float | None) -> str:
    """A duration such as `7.3 s` or `2 min 05 s`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_display() -> PlainDisplay | LiveDisplay:
    """A live display on a terminal, a plain one elsewhere."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
