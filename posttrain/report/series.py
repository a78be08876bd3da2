"""Columns of a metrics.jsonl: each metric is optional, in any line, in any run."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.charts import Values, rounded
from posttrain.report.read import number


class Series:
    """The lines of one stage's metrics.jsonl, by column. Lines of one step are merged, the later value wins."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        steps: dict[float, dict[str, Any]] = {}
        for line in lines:
            step = number(line.get("step"))
            if step is not None:
                steps.setdefault(step, {}).update({k: v for k, v in line.items() if v is not None})
        self.lines = [steps[step] for step in sorted(steps)]
        self.steps: Values = [number(line["step"]) for line in self.lines]

    def __len__(self) -> int:
        return len(self.lines)

    def get(self, *names: str) -> Values:
        """The column of the first of these names that holds any number; None where a line has none."""
        for name in names:
            column = [number(line.get(name)) for line in self.lines]
            if any(value is not None for value in column):
                return rounded(column)
        return [None] * len(self.lines)

    def has(self, *names: str) -> bool:
        return any(value is not None for value in self.get(*names))

    def known(self, *names: str) -> list[float]:
        """The numbers of a column, without its gaps."""
        return [value for value in self.get(*names) if value is not None]

    def first(self, *names: str) -> float | None:
        return next(iter(self.known(*names)), None)

    def last(self, *names: str) -> float | None:
        return next(reversed(self.known(*names)), None)

    def total(self, *names: str) -> float | None:
        values = self.known(*names)
        return sum(values) if values else None

    def named(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names of columns that start with it, in order of appearance."""
        found = dict.fromkeys(name for line in self.lines for name in line if name.startswith(prefix))
        return [name[len(prefix) :] for name in found if self.has(name)]

    def seconds(self, zero: float | None = None) -> Values:
        """Seconds since `zero` (a Unix time) or since the first line."""
        times = [number(line.get("t")) for line in self.lines]
        start = zero if zero is not None else next((t for t in times if t is not None), 0.0)
        return [None if t is None else round(t - start, 2) for t in times]
