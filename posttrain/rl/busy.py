"""When an actor was busy, from many overlapping intervals: merged, and told to the timeline in pieces."""

from posttrain.context import StageContext

MERGE_GAP_S = 0.02
FLUSH_S = 5.0


class BusyLog:
    """Merges the intervals of one actor and activity."""

    def __init__(self, context: StageContext, actor: str, what: str):
        self._context = context
        self._actor = actor
        self._what = what
        self._start: float | None = None
        self._end = 0.0
        self.total_s = 0.0

    def add(self, start: float, end: float) -> None:
        """Intervals come roughly in the order of their ends."""
        if self._start is not None and (start > self._end + MERGE_GAP_S or self._end - self._start > FLUSH_S):
            start = max(start, self._end)
            self.flush()
        if self._start is None:
            self._start, self._end = start, max(start, end)
        else:
            self._start, self._end = min(self._start, start), max(self._end, end)

    @property
    def busy_s(self) -> float:
        """Seconds of all that was merged so far."""
        return self.total_s + (max(0.0, self._end - self._start) if self._start is not None else 0.0)

    def flush(self) -> None:
        """Tell what has been merged so far."""
        if self._start is not None and self._end > self._start:
            self.total_s += self._end - self._start
            self._context.busy(self._actor, self._what, self._start, self._end)
        self._start = None
