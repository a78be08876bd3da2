"""An alarm for when too many rollouts cannot be scored.

Then the reward function itself is at fault, and the rollouts that it can still score are no fair sample to train on.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from posttrain.metrics.unscored import Failure, Unscored
from posttrain.rl.records import ScoredGroup


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


def unscored_of(groups: Iterable[ScoredGroup]) -> Unscored:
    """The rollouts of the groups that could not be scored."""
    counted = Unscored()
    for scored in groups:
        failed: list[Failure] = [
            (outcome, reason)
            for reward, outcome, reason in zip(scored.rewards, scored.outcomes, scored.reasons, strict=True)
            if reward is None
        ]
        counted.add(scored.group.prompt.row.id, failed, len(scored.rewards))
    return counted
