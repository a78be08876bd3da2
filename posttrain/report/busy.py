"""How much generation and training ran at the same time, from the busy events of a stage.

Intervals are (start, end) Unix times. Several actors that generate at once count once: the question is for how long
the run had generation going, not how much of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

GOAL = 0.8  # of what perfect overlap would give


@dataclass(frozen=True)
class Overlap:
    """Seconds between the start of the first and the end of the last optimizer step.

    window_s: the whole of it; gen_s, train_s: with generation, with training going; both_s: with both.
    """

    window_s: float
    gen_s: float
    train_s: float
    both_s: float

    @property
    def share(self) -> float:
        """Share of the window in which both ran."""
        return self.both_s / self.window_s if self.window_s > 0 else 0.0

    @property
    def best(self) -> float:
        """The share that perfect overlap would reach with these two times: the shorter over the longer."""
        longer = max(self.gen_s, self.train_s)
        return min(self.gen_s, self.train_s) / longer if longer > 0 else 0.0

    @property
    def goal(self) -> float:
        return GOAL * self.best


def union(intervals: Iterable[Interval], gap_s: float = 0.0) -> list[Interval]:
    """Disjoint intervals that cover the same time, in order; neighbours closer than `gap_s` become one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1] + gap_s:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Total seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def intersection(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """The time that two lists of disjoint intervals share. Both are in order."""
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
    """The overlap of `generate` and `train` in these busy events, or None when one of the two never happened."""
    events = list(busy)
    train = union((e["start"], e["end"]) for e in events if e.get("what") == "train")
    generate = union((e["start"], e["end"]) for e in events if e.get("what") == "generate")
    if not train or not generate:
        return None
    window = [(train[0][0], train[-1][1])]
    generate = intersection(generate, window)
    return Overlap(length(window), length(generate), length(train), length(intersection(generate, train)))
