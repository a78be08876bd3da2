"""The one queue between generation and training, and the bound on how old a trained token may be.

Pure bookkeeping, no clocks and no threads: the controller asks it what may happen next.

    admit ──► in flight ──► ready (by dispatch order) ──► batch
                   └─────────► dropped (zero advantage, unscored): its place is free at once

The bound. A group is stamped, when it is admitted, with the oldest version that an engine may sample its first token
with; no token of it can be older. Trained at version s its staleness is at most s - stamp, so its last chance is the
batch of version stamp + max_staleness. Every undecided group keeps a place in a batch up to its last chance:

    for every version d:  groups whose last chance is d or earlier  <=  places in the batches up to d

Admission keeps that true, and a batch is closed only if it stays true for what is left; else the batch waits for a
slow group instead of being filled with later ones. So nothing is dropped for its age, and nothing slow is starved.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Undecided:
    stamp: int
    is_ready: bool


class StalenessQueue:
    """Admits groups, takes their results, and forms batches of `groups_per_step` in dispatch order."""

    def __init__(self, groups_per_step: int, max_staleness: int):
        self._batch = groups_per_step
        self._max_staleness = max_staleness
        self._undecided: dict[int, _Undecided] = {}
        self._next_order = 0

    @property
    def num_ready(self) -> int:
        """Groups that wait to be trained on."""
        return sum(item.is_ready for item in self._undecided.values())

    @property
    def num_in_flight(self) -> int:
        """Groups that are being sampled or scored."""
        return len(self._undecided) - self.num_ready

    def room(self, next_version: int, engine_version: int) -> int:
        """How many groups may be admitted now.

        next_version: version at which the next batch will be trained. engine_version: the oldest version that an
        engine may still sample with.
        """
        lag = next_version - engine_version
        return max(0, (self._max_staleness - lag + 1) * self._batch - len(self._undecided))

    def admit(self, engine_version: int) -> int:
        """Take a place; returns the group's dispatch order."""
        order = self._next_order
        self._next_order += 1
        self._undecided[order] = _Undecided(engine_version, is_ready=False)
        return order

    def ready(self, order: int) -> None:
        """The group has been sampled and scored, and is worth training on."""
        self._undecided[order] = _Undecided(self._undecided[order].stamp, is_ready=True)

    def drop(self, order: int) -> None:
        """The group teaches nothing; its place is free."""
        del self._undecided[order]

    def take(self, version: int) -> list[int] | None:
        """The next batch, to be trained at `version`, in dispatch order; None while it is not complete."""
        ready = [order for order in sorted(self._undecided) if self._undecided[order].is_ready]
        if len(ready) < self._batch:
            return None
        batch = ready[: self._batch]
        left = [item.stamp + self._max_staleness for order, item in self._undecided.items() if order not in set(batch)]
        for last_chance in range(version, version + self._max_staleness):
            if sum(chance <= last_chance for chance in left) > self._batch * (last_chance - version):
                return None
        for order in batch:
            del self._undecided[order]
        return batch
