"""The queue between sampling and training. It bounds the age of trained tokens and decides what a batch consists of.

The queue only keeps counts and lists. It has no clock and no thread: the controller asks it what may happen next.

    admit ──► in flight ──► ready ──► part of a batch
                 └────────────┴─────► dropped (for example, because all advantages are zero): its place becomes free

Words. The version of the trainer is the number of optimizer steps that it has made. The batch of version v is the
batch that is trained on at version v. The staleness of a token is the version at which it is trained on, minus the
version that sampled it. A group is undecided from its admission until it is trained on or dropped.

Places. A batch consists of `groups_per_step` places, each of one capability. A group needs a free place to be admitted.
What becomes of the place of a dropped group is explained in places.py.

The bound. A group is stamped at its admission with the oldest version that an engine may still sample with. No token
of the group can be older than its stamp. So the last batch that may contain the group is that of version
stamp + max_staleness: this is the group's last chance. To ensure that no group misses its last chance, the queue keeps
this rule in the modes `pace` and `wait`, for every capability and every version d:

    number of undecided groups whose last chance is d or earlier  <=  number of their places in the batches up to d

Admission keeps the rule because a group only gets a place in a batch up to its last chance.

Modes. A place is counted, but not tied to one group: any ready group of the capability can fill it. The mode decides
which groups fill a batch:

    pace  The oldest ready groups, if the rule above still holds for the groups that are left. Otherwise the batch
          waits for a slow group. No group is dropped for its age.
    wait  The oldest groups, ready or not. The trainer waits for the slowest of them.
    drop  The oldest ready groups, always. The trainer never waits for a slow group, and admission does not wait for a
          slow engine. Groups past their last chance are `expired`, and the controller drops them.

Example. `groups_per_step` is 2, `max_staleness` is 1, and there is one capability. Trainer and engines have version 0.
The batches of versions 0 and 1 have 4 places, so groups 0, 1, 2 and 3 are admitted. Their stamp is 0, and their last
chance is the batch of version 1. Groups 1 and 3 are ready first.

    Batch 0:  In `pace` and `drop` it is groups 1 and 3. Groups 0 and 2 still fit into batch 1.
              In `wait` it is groups 0 and 1, and the trainer waits for group 0.
    Then, in `pace` and `drop`, trainer and engines take version 1, and the 2 places of batch 2 may be given out. Groups
    4 and 5 are admitted with stamp 1, so their last chance is batch 2. They are ready before groups 0 and 2.
    Batch 1:  In `pace` it waits for groups 0 and 2, since this is their last chance.
              In `drop` it is groups 4 and 5. Groups 0 and 2 expire.

Spares. If `max_staleness` is 0, no group can be sampled ahead, and a batch that loses groups would have to wait until
their places are refilled. So the queue also admits spares, which are groups without a place. Their number is the
number of drops to expect by the measured drop rate, and at most `over_provision` batches. A spare takes the place of a
dropped group of its capability. A spare that was not needed is `expired` once the batch is taken.

After a crash, undecided groups from before it are adopted: a group gets a place in a batch up to its last chance, or
the caller is told that there is none.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from posttrain.rl.loop.places import BatchPlaces, Place
from posttrain.rl.prompts.quotas import places, scattered
from posttrain.rl.records import DropReason

Mode = Literal["pace", "wait", "drop"]


class _Undecided(Struct, frozen=True):
    """A group that is neither trained on nor dropped. Its stamp and place are explained at the top of this file."""

    stamp: int
    place: Place | None  # None for a spare
    capability: str
    is_ready: bool = False


class StalenessQueue:
    """Admits groups, is told what became of them, and forms batches of `groups_per_step` groups.

    shares: the share of each capability; their sum is 1. refills: how often a place is refilled before it is given to
    another capability. version: the version of the first batch. first_order: the dispatch order of the next new group.
    over_provision: the largest number of spares, in batches.
    """

    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        shares: Mapping[str, float],
        *,
        refills: int,
        version: int = 0,
        mode: Mode = "pace",
        first_order: int = 0,
        over_provision: float = 0.0,
    ):
        self._batch = groups_per_step
        self._max_staleness = max_staleness
        self._places = BatchPlaces(groups_per_step, shares, refills=refills, version=version)
        self._mode = mode
        self._most_spares = 0 if max_staleness else int(over_provision * groups_per_step)
        self._spares_coming = places(shares)
        self._drop_rate = 0.0
        self._decided: Counter[bool] = Counter()  # groups since the last batch, by whether they were dropped
        self._version = version  # the version of the next batch
        self._undecided: dict[int, _Undecided] = {}
        self._num_ready = 0
        self._next_order = first_order

    @property
    def groups_per_step(self) -> int:
        """The number of groups in a batch."""
        return self._batch

    @property
    def too_old(self) -> DropReason:
        """Why the groups of `expired` are dropped: stale in mode `drop`, otherwise spares that no batch needed."""
        return DropReason.STALE if self._mode == "drop" else DropReason.SURPLUS

    @property
    def num_ready(self) -> int:
        """Groups that wait to be trained on."""
        return self._num_ready

    @property
    def num_in_flight(self) -> int:
        """Groups that are being sampled or scored."""
        return len(self._undecided) - self._num_ready

    @property
    def num_lent(self) -> int:
        """Places that have gone to another capability than the mixture's."""
        return self._places.num_lent

    @property
    def next_order(self) -> int:
        """The dispatch order of the next new group."""
        return self._next_order

    def move(self, shares: Mapping[str, float]) -> None:
        """Admit new groups by these shares."""
        self._places.move(shares)
        self._spares_coming = scattered(shares)

    def stamp_of(self, order: int) -> int:
        """The oldest policy version that may have sampled for a group."""
        return self._undecided[order].stamp

    def holds(self, order: int) -> bool:
        """Whether a group is admitted and not decided."""
        return order in self._undecided

    def room(self, engine_version: int) -> int:
        """How many groups may be admitted now. engine_version: the oldest that an engine may still sample with."""
        return self._places_left(engine_version) or self._spares_left()

    def _places_left(self, engine_version: int) -> int:
        version = engine_version
        if self._mode == "drop":
            if engine_version + self._max_staleness < self._version:
                return 0  # the group would be past its last chance at once
            version = self._version
        return self._places.num_left(version + self._max_staleness)

    def _spares_left(self) -> int:
        if not self._most_spares:
            return 0
        placed = sum(not item.is_ready and item.place is not None for item in self._undecided.values())
        wanted = math.ceil(placed * self._drop_rate / (1 - self._drop_rate)) if self._drop_rate < 1 else placed
        return max(0, min(wanted, self._most_spares) - self.num_spares)

    @property
    def num_spares(self) -> int:
        """The number of spares, which are groups without a place."""
        return sum(item.place is None for item in self._undecided.values())

    def admit(self, engine_version: int, choose: Callable[[str], int | None] | None = None) -> tuple[int, str]:
        """Admit a group. Returns its dispatch order and the capability that its prompt must have.

        The group becomes a spare if there is no place for it. choose: returns, for a capability, the order of a group
        that was admitted before a crash and has no place yet, or None if there is none.
        """
        place = self._places.take() if self._places_left(engine_version) else None
        capability = place.capability if place is not None else next(self._spares_coming)
        order = choose(capability) if choose is not None else None
        if order is None:
            order = self._next_order
            self._next_order += 1
        self._undecided[order] = _Undecided(engine_version, place, capability)
        return order, capability

    def adopt(self, order: int, capability: str, stamp: int, *, is_ready: bool) -> bool:
        """Give a place to a group from before a crash. Returns False if no place is early enough for it.

        All groups are adopted before any is admitted, in the order of their stamps, oldest first.
        """
        last_chance = stamp + self._max_staleness
        place = self._places.take_for(capability, last_chance) if last_chance >= self._version else None
        if place is None:
            return False
        self._undecided[order] = _Undecided(stamp, place, capability, is_ready)
        self._num_ready += is_ready
        return True

    def ready(self, order: int) -> None:
        """The group has been sampled and scored, and is worth training on."""
        item = self._undecided[order]
        self._decided[False] += 1
        self._undecided[order] = _Undecided(item.stamp, item.place, item.capability, True)
        self._num_ready += not item.is_ready

    def drop(self, order: int) -> None:
        """Drop a group. A spare of its capability gets the place; without one the place becomes free."""
        dropped = self._undecided.pop(order)
        self._decided[True] += not dropped.is_ready
        self._num_ready -= dropped.is_ready
        place = dropped.place
        if place is None:
            return
        spares = (
            order
            for order, item in self._undecided.items()
            if item.place is None and item.capability == place.capability
        )
        heir = min(spares, default=None) if self._most_spares else None
        if heir is not None:
            self._undecided[heir] = replace(self._undecided[heir], place=place.refilled())
        else:
            self._places.give_back(place)

    def take(self, version: int) -> list[int] | None:
        """The groups of the batch of `version`, in dispatch order; None if the batch cannot be formed yet."""
        wanted = self._places.of_batch(version)
        # The controller asks after every change, so the cheap test comes first.
        if wanted.total() < self._batch or self._num_ready < self._batch:
            return None
        batch: list[int] = []
        for capability, count in wanted.items():
            own = sorted(
                (item.stamp, order, item.is_ready)
                for order, item in self._undecided.items()
                if item.place is not None and item.capability == capability
            )
            first = own if self._mode == "wait" else [item for item in own if item[2]]
            chosen = first[:count]
            if len(chosen) < count or not all(is_ready for _, _, is_ready in chosen):
                return None
            taken = set(chosen)
            left = [item[0] + self._max_staleness for item in own if item not in taken]
            if self._mode != "drop" and not self._fit(capability, left, version):
                return None
            batch += [order for _, order, _ in chosen]
        for order in batch:
            del self._undecided[order]
        self._num_ready -= len(batch)
        self._places.close(version)
        self._version = version + 1
        if total := self._decided.total():
            self._drop_rate = (self._drop_rate + self._decided[True] / total) / 2
            self._decided.clear()
        return sorted(batch)

    def expired(self) -> list[int]:
        """Groups past their last chance. These are spares, and in mode `drop` any groups."""
        return [order for order, item in self._undecided.items() if item.stamp + self._max_staleness < self._version]

    def _fit(self, capability: str, last_chances: list[int], version: int) -> bool:
        """Whether groups with these last chances all find a place in time in the batches after `version`."""
        room, num_due = 0, Counter(last_chances)
        for last_chance in range(version, version + self._max_staleness):
            if last_chance > version:
                room += self._places.of_batch(last_chance)[capability]
            if sum(count for chance, count in num_due.items() if chance <= last_chance) > room:
                return False
        return True
