"""How many threads the trainer computes with on a CPU: it takes the cores that engines leave, as measured.

An engine on a CPU has one thread. The trainer may have more, which helps while engines wait for it, and harms while
the cores are theirs. Which of the two it is shows in the steps:

    settled ──► the trainer is waited for: one thread more ──┐
       ▲    └─► the trainer waits: one thread less ──────────┤
       │                                                     ▼
       └── kept if steps became faster; else undone, and not tried again for a while ── trial
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

WINDOW = 4  # steps that are measured before a decision
APART = 0.1  # by how much the shares of waiting must differ before another number is tried
FASTER = 0.95  # a trial is kept if a trained token takes at most this share of the time
REST = 8  # windows before a number that did not help is tried again


class ThreadBalance:
    """The number of threads between 1 and `most`, from the metrics of the steps. It begins with `threads`.

    engines: names of the rollout engines at the start, as in the metrics. One that has left has no metric any more.
    """

    def __init__(self, threads: int, most: int, engines: Sequence[str]):
        self.threads = threads
        self._engines = engines
        self._most = most
        self._steps: list[Mapping[str, Any]] = []
        self._is_new = True  # the first step with a number is not counted
        self._before: tuple[int, float] | None = None  # in a trial: the number before it, and its seconds a token
        self._resting: dict[int, int] = {}  # number -> windows until it may be tried again

    def measured(self, metrics: Mapping[str, Any]) -> bool:
        """Take the metrics of a step. Returns whether `threads` is another number from now on."""
        if self._is_new:
            self._is_new = False
            return False
        self._steps.append(metrics)
        if len(self._steps) < WINDOW:
            return False
        steps, self._steps = self._steps, []
        self._resting = {number: left - 1 for number, left in self._resting.items() if left > 1}
        token_s = sum(step["step_wall_s"] for step in steps) / max(1, sum(step["tokens_trained"] for step in steps))
        if self._before is not None:
            (number, before_s), self._before = self._before, None
            if token_s <= FASTER * before_s:
                return False
            self._resting[self.threads] = REST
            return self._change(number)
        wanted = self.threads + self._direction(steps)
        if wanted == self.threads or not 1 <= wanted <= self._most or wanted in self._resting:
            return False
        self._before = (self.threads, token_s)
        return self._change(wanted)

    def _change(self, number: int) -> bool:
        self.threads = number
        self._is_new = True
        return True

    def _direction(self, steps: Sequence[Mapping[str, Any]]) -> int:
        """1 if the engines wait more than the trainer, -1 if the trainer waits more, 0 if they wait about as much."""
        trainer = fmean(step["idle/trainer"] for step in steps)
        names = [f"idle/{name}" for name in self._engines]
        engines = fmean([step[name] for step in steps for name in names if name in step] or [0.0])
        return (engines > trainer + APART) - (trainer > engines + APART)
