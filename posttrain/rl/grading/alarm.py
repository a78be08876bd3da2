"""Tells when too many rollouts cannot be scored: then it is the reward that fails, and what is trained on is a choice
made by its failures."""

from collections import Counter, deque
from typing import Any

from posttrain.rl.records import ScoredGroup

MOST_FREQUENT = 3


class UnscoredAlarm:
    """Watches the share of unscored rollouts over a step's worth of decided groups, trained on or dropped.

    An alarm starts a new window, so that a reward that stays broken raises one a step and not one a group.
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
