"""The columns of a metrics.jsonl. Any metric may be missing in any line and in any run."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.charts import Values, rounded
from posttrain.report.read import number


class Series:
    """The lines of one stage's metrics.jsonl by column. Lines of the same step are merged; the later value counts."""

    def __init__(self, lines: Sequence[Mapping[str, object]]):
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
        """The first of these columns that holds any number: one value for each line, None if a line has none."""
        for name in names:
            column = [number(line.get(name)) for line in self.lines]
            if any(value is not None for value in column):
                return rounded(column)
        return [None] * len(self.lines)

    def has(self, *names: str) -> bool:
        """True if one of these columns holds any number."""
        return any(value is not None for value in self.get(*names))

    def known(self, *names: str) -> list[float]:
        """The numbers of a column without its gaps."""
        return [value for value in self.get(*names) if value is not None]

    def first(self, *names: str) -> float | None:
        """The first number of a column, or None."""
        return next(iter(self.known(*names)), None)

    def last(self, *names: str) -> float | None:
        """The last number of a column, or None."""
        return next(reversed(self.known(*names)), None)

    def total(self, *names: str) -> float | None:
        """The sum of a column, or None."""
        values = self.known(*names)
        return sum(values) if values else None

    def named(self, prefix: str) -> list[str]:
        """The rest of the name of each column that starts with `prefix`, in order of appearance."""
        found = dict.fromkeys(name for line in self.lines for name in line if name.startswith(prefix))
        return [name[len(prefix) :] for name in found if self.has(name)]

    def seconds(self, zero: float | None = None) -> Values:
        """For each line, the seconds since `zero` (a Unix time), or since the first line if it is None."""
        times = [number(line.get("t")) for line in self.lines]
        start = zero if zero is not None else next((t for t in times if t is not None), 0.0)
        return [None if t is None else round(t - start, 2) for t in times]
