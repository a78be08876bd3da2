"""Sends a stage's metrics to TensorBoard, trackio and wandb while it runs, if the config asks for it.

    StageContext.metrics ─► metrics.jsonl ─► Follower, a thread of the stage's process ─► each tracker's own library

metrics.jsonl is the record of the run. A tracker gets the numbers of each line that is added to it. The stage waits for
trackers only at its end, for at most `END_S` seconds. A tracker that raises is reported once, as an event, and then
switched off.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.trackers import TrackersConfig
from posttrain.context import StageContext
from posttrain.metrics.tail import NewLines

POLL_S = 1.0
END_S = 60.0  # seconds that the trackers have to send the rest and finish when the stage has ended


@dataclass(frozen=True, slots=True)
class Tracker:
    """An open tracker. log: called with a step and the numbers of its line. close: called once, to write the rest."""

    log: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


Opener = Callable[[dict[str, Any], int], Tracker]  # keyword arguments of `arguments`, the first step


def arguments(config: TrackersConfig | None, run: str, stage: str, *, folder: Path) -> dict[str, dict[str, Any]]:
    """The keyword arguments that each tracker's library is opened with, by the tracker's name. folder: the stage's."""
    config = config or TrackersConfig()
    found: dict[str, dict[str, Any]] = {}
    if config.tensorboard:
        found["tensorboard"] = {"log_dir": str(folder / "tensorboard")}
    if config.trackio:
        found["trackio"] = {"project": config.trackio.project, "name": f"{run}-{stage}", "resume": "allow"}
    if config.wandb:
        project, mode = config.wandb.project, config.wandb.mode
        names = {"name": f"{run}-{stage}", "group": run}
        found["wandb"] = {"project": project, "mode": mode, **names, "dir": str(folder)}
    return found


def _tensorboard(kwargs: dict[str, Any], step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(**kwargs, purge_step=step)  # steps that a resumed stage trains again are shown once

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _trackio(kwargs: dict[str, Any], step: int) -> Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(**kwargs)
    return Tracker(lambda step, values: trackio.log(values, step=step), trackio.finish)


def _wandb(kwargs: dict[str, Any], step: int) -> Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(**kwargs)
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)


OPENERS: Mapping[str, Opener] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


@contextmanager
def tracked(
    config: TrackersConfig | None, context: StageContext, openers: Mapping[str, Opener] = OPENERS
) -> Iterator[None]:
    """While the `with` block runs, new lines of the stage's metrics.jsonl go to the trackers that are switched on."""
    run = context.events.resolve().parent.name
    found = arguments(config, run, context.name, folder=context.dir)
    if not found:
        yield
        return
    follower = Follower(context, {name: (openers[name], kwargs) for name, kwargs in found.items()})
    follower.start()
    try:
        yield
    finally:
        follower.end()


class Follower(threading.Thread):
    """Reads the lines that are added to metrics.jsonl. It opens each tracker when the first line for it arrives."""

    def __init__(self, context: StageContext, trackers: Mapping[str, tuple[Opener, dict[str, Any]]]):
        super().__init__(name="trackers", daemon=True)
        self._context = context
        self._lines = NewLines(context.dir / "metrics.jsonl")
        self._closed = dict(trackers)
        self._open: dict[str, Tracker] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Send new lines until `end` is called, then the rest."""
        while not self._ended.wait(POLL_S):
            self._hand_on()
        self._hand_on()
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)

    def end(self) -> None:
        """Send the rest and close. A tracker that takes longer than END_S is abandoned."""
        self._ended.set()
        self.join(END_S)
        if self.is_alive():
            self._report(", ".join(self._open or self._closed), f"did not finish within {END_S:g} s")

    def _hand_on(self) -> None:
        for step, values in self._lines.read():
            for name, (opener, kwargs) in list(self._closed.items()):
                self._guarded(name, lambda n=name, o=opener, k=kwargs, s=step: self._open.update({n: o(k, s)}))
                self._closed.pop(name)
            for name, tracker in list(self._open.items()):
                self._guarded(name, lambda t=tracker, s=step, v=values: t.log(s, v))

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        """Call a tracker. A tracker must not end a run, so any exception switches it off."""
        try:
            call()
        except (Exception, SystemExit) as error:
            self._open.pop(name, None)
            self._report(name, f"{type(error).__name__}: {error}".splitlines()[0])

    def _report(self, name: str, error: str) -> None:
        self._context.event("tracker_failed", tracker=name, error=error)
