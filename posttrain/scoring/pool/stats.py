"""What a pool counts of its work."""

from collections import Counter
from dataclasses import dataclass, field

from posttrain.records import Outcome


@dataclass(slots=True)
class PoolStats:
    """Counts of a pool's work. outcomes: number of scores by outcome. busy_s: seconds that all processes together spent
    in the reward function. num_retries: how often a rollout was tried again. num_restarts: how often a process was.
    num_timeouts: how often a deadline passed, which may be several times for a rollout. late_row: the id of the row of
    the last such rollout.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    busy_s: float = 0.0
    num_retries: int = 0
    num_restarts: int = 0
    num_timeouts: int = 0
    late_row: str = ""

    @property
    def lateness(self) -> str:
        """Such as "37 timeouts so far, e.g. p55"; "" if no deadline passed."""
        many = "timeout" if self.num_timeouts == 1 else "timeouts"
        return f"{self.num_timeouts} {many} so far, e.g. {self.late_row}" if self.num_timeouts else ""

    def __add__(self, other: "PoolStats") -> "PoolStats":
        return PoolStats(
            self.outcomes + other.outcomes,
            self.busy_s + other.busy_s,
            self.num_retries + other.num_retries,
            self.num_restarts + other.num_restarts,
            self.num_timeouts + other.num_timeouts,
            other.late_row or self.late_row,
        )
