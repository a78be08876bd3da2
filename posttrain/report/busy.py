"""How long generation and training ran at the same time, from the busy events of a stage.

Intervals are (start, end) in Unix seconds. Times in which several engines generate at once count once, because the
question is how long the run was generating, not how many tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

GOAL = 0.8  # the share of the best possible overlap that a run should reach


@dataclass(frozen=True)
class Overlap:
    """Seconds between the start of the first optimizer step and the end of the last.

    window_s: all seconds. gen_s: with generation. train_s: with training. both_s: with both.
    """

    window_s: float
    gen_s: float
    train_s: float
    both_s: float

    @property
    def share(self) -> float:
        """Share of the window in which generation and training both ran, in [0, 1]."""
        return self.both_s / self.window_s if self.window_s > 0 else 0.0

    @property
    def best(self) -> float:
        """The share that perfect overlap would reach with these times: the shorter of the two over the longer."""
        longer = max(self.gen_s, self.train_s)
        return min(self.gen_s, self.train_s) / longer if longer > 0 else 0.0

    @property
    def goal(self) -> float:
        """The share that a run should reach: GOAL times the best."""
        return GOAL * self.best


def union(intervals: Iterable[Interval], gap_s: float = 0.0) -> list[Interval]:
    """Disjoint intervals that cover the same time, in order. Neighbours less than `gap_s` seconds apart become one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1] + gap_s:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Total length of disjoint intervals in seconds."""
    return sum(end - start for start, end in intervals)


def intersection(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """The intervals that two ordered lists of disjoint intervals have in common."""
    shared, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            shared.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return shared


def measure_overlap(busy: Iterable[Mapping[str, Any]]) -> Overlap | None:
    """The overlap of the `generate` and `train` events of a stage; None if either never happened."""
    events = list(busy)
    train = union((e["start"], e["end"]) for e in events if e.get("what") == "train")
    generate = union((e["start"], e["end"]) for e in events if e.get("what") == "generate")
    if not train or not generate:
        return None
    window = [(train[0][0], train[-1][1])]
    generate = intersection(generate, window)
    return Overlap(length(window), length(generate), length(train), length(intersection(generate, train)))
