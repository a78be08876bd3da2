"""An alarm for when too many rollouts cannot be scored.

Then the reward function itself is at fault, and the rollouts that it can still score are no fair sample to train on.
"""

from collections import Counter, deque
from typing import Any

from posttrain.rl.records import ScoredGroup

MOST_FREQUENT = 3


class UnscoredAlarm:
    """Watches the share of unscored rollouts over the last `num_groups` decided groups, trained on or dropped.

    limit: the alarm is raised above this share, 0 to 1. After an alarm the window starts anew, so that a reward that
    stays broken raises one alarm for each `num_groups` groups, and not one for each group.
    """

    def __init__(self, limit: float, num_groups: int):
        self._limit = limit
        self._num_groups = num_groups
        self._groups: deque[ScoredGroup] = deque()
        self._num_rollouts = self._num_unscored = 0  # of the window

    def observe(self, scored: ScoredGroup) -> dict[str, Any] | None:
        """A group was decided. Returns the fields of the event `alarm` if the share is too large, else None.

        what, fraction, limit; groups, rollouts: how many in the window; outcomes: unscored rollouts by outcome;
        reasons: [reason, how often] of the most frequent ones.
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
        unscored = [
            (outcome, reason)
            for group in groups
            for reward, outcome, reason in zip(group.rewards, group.outcomes, group.reasons, strict=True)
            if reward is None
        ]
        return {
            "what": "unscored",
            "fraction": fraction,
            "limit": self._limit,
            "groups": len(groups),
            "rollouts": num_rollouts,
            "outcomes": dict(Counter(outcome for outcome, _ in unscored).most_common()),
            "reasons": [list(item) for item in Counter(reason for _, reason in unscored).most_common(MOST_FREQUENT)],
        }

    def _count(self, scored: ScoredGroup, sign: int) -> None:
        self._num_rollouts += sign * len(scored.rewards)
        self._num_unscored += sign * scored.rewards.count(None)
