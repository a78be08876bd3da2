"""Notices that a run gets nowhere: too many rollouts cannot be scored, or group after group teaches nothing.

If many cannot be scored, the reward function itself is at fault, and the rollouts that it can still score are no fair
sample to train on. If groups teach nothing, the prompts are too hard or too easy, or the reward is at fault.
"""

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from posttrain.errors import StageError
from posttrain.metrics.unscored import Failure, Unscored
from posttrain.rl.records import Drop, ScoredGroup


class UnscoredAlarm:
    """Watches the share of unscored rollouts over the last `num_groups` groups that were scored.

    where: what the groups are for, such as "training". limit: the alarm is raised above this share, 0 to 1. After an
    alarm the window starts anew, so that a reward that stays broken raises one alarm for each `num_groups` groups, and
    not one for each group.
    """

    def __init__(self, limit: float, num_groups: int, where: str = "training"):
        self._limit = limit
        self._num_groups = num_groups
        self._where = where
        self._groups: deque[ScoredGroup] = deque()
        self._num_rollouts = self._num_unscored = 0  # of the window

    def observe(self, scored: ScoredGroup) -> dict[str, Any] | None:
        """A group was scored. Returns the fields of the event `alarm` if the share is too large, else None.

        They are those of `Unscored.event_fields`, and groups, rollouts: how many are in the window.
        """
        self._groups.append(scored)
        self._count(scored, 1)
        if len(self._groups) > self._num_groups:
            self._count(self._groups.popleft(), -1)
        num_rollouts = self._num_rollouts
        fraction = self._num_unscored / num_rollouts
        if len(self._groups) < self._num_groups or fraction <= self._limit:
            return None
        groups, self._groups = self._groups, deque()
        self._num_rollouts = self._num_unscored = 0
        fields = unscored_of(groups).event_fields(f"{self._where}, the last {len(groups)} groups", self._limit)
        return {**fields, "groups": len(groups), "rollouts": num_rollouts}

    def _count(self, scored: ScoredGroup, sign: int) -> None:
        self._num_rollouts += sign * len(scored.rewards)
        self._num_unscored += sign * scored.rewards.count(None)


class IdleLimit:
    """Ends a run in which `limit` groups in a row are dropped for their rewards.

    It also ends one of whose first `first` groups no reply could be scored; None: not.
    """

    def __init__(self, limit: int, first: int | None = None):
        self.limit = limit
        self._first = first
        self._in_a_row = 0
        self._without_score: list[ScoredGroup] | None = [] if first is not None else None  # None: something had one

    def observe(self, scored: ScoredGroup, reason: Drop | None) -> None:
        """A group was scored, and dropped if there is a reason. Raises StageError if it was one too many."""
        if self._without_score is not None:
            self._observe_first(scored, self._without_score)
        self._in_a_row = self._in_a_row + 1 if reason is not None else 0
        if self._in_a_row >= self.limit:
            rewards = dict(Counter(scored.rewards))
            why = Counter(scored.reasons).most_common(1)[0][0]
            raise StageError(
                f"{self.limit} groups in a row taught nothing (the last: {reason}, rewards {rewards}, most often "
                f"{why!r}); give it prompts of other difficulty, or look at the reward"
            )

    def _observe_first(self, scored: ScoredGroup, groups: list[ScoredGroup]) -> None:
        if scored.scored_rewards:
            self._without_score = None
            return
        groups.append(scored)
        if len(groups) == self._first:
            reasons = Counter(reason for group in groups for reason in group.reasons)
            raise StageError(
                f"not one reply of the first {len(groups)} groups could be scored; most often: "
                f"{reasons.most_common(1)[0][0]}"
            )


def unscored_of(groups: Iterable[ScoredGroup]) -> Unscored:
    """The rollouts of the groups that could not be scored."""
    counted = Unscored()
    for scored in groups:
        counted.add(scored.group.prompt.row.id, failures_of(scored), len(scored.rewards))
    return counted


def failures_of(scored: ScoredGroup) -> list[Failure]:
    """The outcome and the reason of each rollout of the group that could not be scored."""
    return [
        (outcome, reason)
        for reward, outcome, reason in zip(scored.rewards, scored.outcomes, scored.reasons, strict=True)
        if reward is None
    ]
