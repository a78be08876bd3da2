"""How many engines a run should have: decided from figures of its steps alone, without a clock or an engine.

    steps ──► window: the trainer's wait, the engines' work ──► more | fewer | stay
                                                                     └──► after the next window: was it worth it?

Words. The wait is the share of the time in which the trainer had no batch. The work is the share in which an engine had
something to sample, on average. The cost of a run is the number of its devices, those of the trainer included.

More. While the trainer waits for more than 0.05 of the time, engines are added as long as the next one is expected to
be worth its cost. With k engines in the place of n, steps are expected to be k / n times as fast, but at most
1 / (1 - wait) times, because then the trainer does not wait any more. A further engine is worth its cost if it makes
steps faster by a quarter of the share by which it makes them dearer. The number is at most doubled at a time.

Fewer. While the trainer waits for less than that, engines leave as far as the rest is expected to be at work for at
most 0.9 of the time. The number is at most halved at a time.

Proof. What was expected may not come true: engines of one machine share its cores, and a slow reply is slow on any
engine. So each change is judged by the next window, by the same rule. A change that was not worth it is taken back, and
its number of engines is not tried again for the next 8 windows; for twice as many if it fails again, and so on.

Forecast. A number that a forecast chose is judged by the first window with it. If steps are as slow as the forecast
expects with fewer engines, those are tried: the forecast knows nothing of what the engines take from each other. If
steps are no slower then, though the trainer waits, the greater number is not tried again for so many windows.

A window begins when the number of engines has changed. It leaves out as many steps as may still be trained on groups
from before the change, and has at least 4 steps and 4 seconds.

Example. Trainer and engine have one device each. With 1 engine a step takes 4 s, in 3 s of which the trainer waits. Two
engines come first, since the number is at most doubled, then 4 are the best: 1 / (1 - 0.75) = 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.config.resources import ActorResources, RolloutResources, TrainerResources
from posttrain.rl.config import RlConfig

WORTH = 0.25
WORK = 0.9
NO_WAIT = 0.05
STEPS, SECONDS = 4, 4.0
BARRED = 8  # windows


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One optimizer step. seconds: since the step before. waited_s: for its batch. work: share of the time in which an
    engine had something to sample, on average.
    """

    seconds: float
    waited_s: float
    work: float


@dataclass(frozen=True, slots=True)
class Decision:
    """How many engines there should be, and why, in words."""

    workers: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tried:
    """A number of engines in a forecast. step_s: seconds of a step. waits: share of them in which the trainer waits."""

    workers: int
    step_s: float
    waits: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The number of engines that a forecast takes, what it has tried, and why. costs: it was made with, as JSON."""

    workers: int
    tried: tuple[Tried, ...]
    reason: str
    costs: str = ""


def role_costs(config: RlConfig) -> tuple[float, float]:
    """The cost of an engine, and of everything else that a stage always has: GPUs or, if the engines use none, CPUs."""
    resources, rollout = config.resources, config.resources.rollout
    is_gpu = bool(rollout.gpus)

    def devices(item: RolloutResources | TrainerResources | ActorResources | None) -> float:
        return 0.0 if item is None else item.gpus if is_gpu else item.cpus

    judge = resources.judge
    others = config.parallel.processes * devices(resources.trainer) + devices(resources.reference)
    others += judge.workers * devices(judge) if judge is not None else 0.0
    return devices(rollout) or 1.0, others


def worth(now: float, then: float) -> float:
    """How many times as fast steps must be for a change of the whole cost from `now` to `then` to be worth it."""
    return 1 + WORTH * (then / now - 1)


@dataclass(frozen=True, slots=True)
class _Window:
    workers: int
    step_s: float
    wait: float
    work: float


@dataclass(slots=True)
class _Limit:
    """A number of engines that the run should not go beyond, for so many more windows. times: it was set."""

    workers: int
    left: int = 0
    times: int = 0

    def set(self, workers: int) -> None:
        """Do not go beyond this number for now."""
        self.workers = workers
        self.left = BARRED << self.times
        self.times += 1

    def pass_window(self) -> None:
        """Note that a window has passed."""
        self.left = max(0, self.left - 1)


class Scaling:
    """Decides the number of engines, from `least` to `most`.

    engine_cost: of one engine. other_cost: of the trainer and everything else that the run always has, in the same
    unit. settling: steps after a change that may still be trained on groups from before it.
    """

    def __init__(self, least: int, most: int, *, engine_cost: float, other_cost: float, settling: int):
        self._least = least
        self._most = most
        self._engine_cost = engine_cost
        self._other_cost = other_cost
        self._settling = settling
        self._workers = self._wanted = 0
        self._seen: list[StepFigures] = []
        self._skipped = 0
        self._before: _Window | None = None  # the window of before the last change, while it is not judged yet
        self._ceiling, self._floor = _Limit(most), _Limit(least)
        self._expected: dict[int, float] = {}  # seconds of a step by the number of engines, as a forecast has them

    def observe(self, figures: StepFigures, workers: int, *, is_changing: bool = False) -> Decision | None:
        """Take note of a step. Returns how many engines there should be, or None if as many as there are.

        workers: how many there are. is_changing: whether some are about to join or to leave.
        """
        if is_changing or workers != self._workers:
            self._begin(workers)
            return None
        if self._skipped < self._settling:
            self._skipped += 1
            return None
        self._seen.append(figures)
        if len(self._seen) < STEPS or sum(item.seconds for item in self._seen) < SECONDS:
            return None
        window = self._window()
        self._seen.clear()
        self._ceiling.pass_window()
        self._floor.pass_window()
        if self._before is not None and workers != self._wanted:
            self._before = None  # an engine was lost, or could not be had
        decision = self._judge(window) or self._disappointed(window) or self._more(window) or self._fewer(window)
        self._wanted = workers if decision is None else decision.workers
        return decision if decision is not None and decision.workers != workers else None

    def expect(self, tried: Sequence[Tried]) -> None:
        """Judge the next window by a forecast. tried: the numbers of engines in it."""
        self._expected = {item.workers: item.step_s for item in tried}

    def refused(self, workers: int) -> None:
        """Note that no more than so many engines can be had for now."""
        self._ceiling.set(workers)
        self._before = None

    def _begin(self, workers: int) -> None:
        self._workers = workers
        self._skipped = 0
        self._seen.clear()

    def _window(self) -> _Window:
        seconds = sum(item.seconds for item in self._seen)
        wait = min(1.0, sum(item.waited_s for item in self._seen) / seconds)
        work = sum(item.work * item.seconds for item in self._seen) / seconds
        return _Window(self._workers, seconds / len(self._seen), wait, work)

    def _cost(self, workers: int) -> float:
        return self._other_cost + workers * self._engine_cost

    def _worth(self, now: int, then: int) -> float:
        """How many times as fast steps must be with `then` engines for the change to be worth it."""
        return worth(self._cost(now), self._cost(then))

    # ------------------------------------------------------------------ the three rules

    def _judge(self, window: _Window) -> Decision | None:
        """Take the last change back if it was not worth it."""
        before, self._before = self._before, None
        if before is None or before.workers == window.workers:
            return None
        faster = before.step_s / window.step_s
        if faster >= self._worth(before.workers, window.workers):
            if window.workers < before.workers and faster >= 1 and window.wait > NO_WAIT:
                self._ceiling.set(before.workers - 1)
            return None
        if window.workers > before.workers:
            self._ceiling.set(max(before.workers, window.workers - 1))
        else:
            self._floor.set(before.workers)
        return Decision(
            before.workers,
            f"{before.workers} to {window.workers} engines was not worth it: steps took {before.step_s:.3g} s, and "
            f"then {window.step_s:.3g} s",
        )

    def _disappointed(self, window: _Window) -> Decision | None:
        """Try the fewest engines with which a forecast expects steps to be as fast as they are. It is asked once."""
        expected, self._expected = self._expected, {}
        least = max(self._least, -(-window.workers // 2))
        enough = [workers for workers, seconds in expected.items() if seconds <= window.step_s and workers >= least]
        wanted = min(enough, default=window.workers)
        if wanted >= window.workers:
            return None
        self._before = window
        return Decision(
            wanted,
            f"a step took {window.step_s:.3g} s, and the forecast expects {expected[wanted]:.3g} s with {wanted} "
            "engines",
        )

    def _more(self, window: _Window) -> Decision | None:
        now = window.workers
        most = min(self._most, 2 * now, self._ceiling.workers if self._ceiling.left else self._most)
        bound = 1 / max(1e-9, 1 - min(window.wait, window.work)) if window.wait > NO_WAIT else 1.0

        def expected(workers: int) -> float:
            return min(workers / now, bound)

        wanted = now
        while wanted < most and expected(wanted + 1) / expected(wanted) >= self._worth(wanted, wanted + 1):
            wanted += 1
        if wanted < self._least:
            wanted = min(self._least, most)
        return self._decided(window, max(wanted, now))

    def _fewer(self, window: _Window) -> Decision | None:
        now = window.workers
        least = max(self._least, -(-now // 2), self._floor.workers if self._floor.left else 0)
        wanted = now
        while window.wait <= NO_WAIT and wanted > least and window.work * now / (wanted - 1) <= WORK:
            wanted -= 1
        return self._decided(window, wanted)

    def _decided(self, window: _Window, wanted: int) -> Decision | None:
        if wanted == window.workers:
            return None
        self._before = window
        return Decision(
            wanted,
            f"the trainer waited {window.wait:.0%} of the time, the engines were at work {window.work:.0%} of it, and "
            f"a step took {window.step_s:.3g} s",
        )
