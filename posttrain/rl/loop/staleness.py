"""The one queue between generation and training: how old a trained token may be, and what a batch is made of.

Pure bookkeeping, no clocks and no threads: the controller asks it what may happen next.

    admit ──► in flight ──► ready (by dispatch order) ──► batch
                   └─────────► dropped (zero advantage, unscored): its place is free at once

Places. Every place of every batch belongs to a capability (`quotas`). A group that is admitted takes the next one; if
it is dropped, the next to be admitted takes the same place. A batch holds exactly as many groups of each capability as
it has places for it. A place that has been refilled `refills` times in vain goes to another capability, so that one
that has run dry delays a batch by no more than that.

The bound. A group is stamped, when it is admitted, with the oldest version that an engine may sample its first token
with; no token of it can be older. Trained at version s its staleness is at most s - stamp, so its last chance is the
batch of version stamp + max_staleness. Every undecided group keeps a place in a batch up to its last chance; for every
capability and every version d:

    groups whose last chance is d or earlier  <=  places in the batches up to d

Admission keeps that true, since only places up to the last chance are given out. What the batch that is trained at
version v may be made of depends on the mode:

    pace  a batch is closed only if the sentence above stays true for what is left; else it waits for a slow group
          instead of being filled with later ones. Nothing is dropped for its age, and nothing slow is starved.
    wait  a batch is always the oldest groups of each capability: the trainer waits for the slowest of them.
    drop  a batch is whatever is ready, and admission asks for the trainer's version only: nobody waits for a slow
          group or a slow engine, and groups past their last chance are `expired`, to be dropped.

Spares. Where `max_staleness` is 0 nothing can be sampled ahead, and a batch that lost groups would wait for their
refills. So spare groups without a place are sampled beside it, as many as the measured drop rate lets expect losses
(and at most `over_provision` batches); a spare takes the place of a group that is dropped, and one that is not needed
is `expired` when the batch is taken.

After a crash, groups that are still there are adopted: each takes a place again that is early enough, or is told that
there is none.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.rl.prompts.quotas import places

Mode = Literal["pace", "wait", "drop"]


@dataclass(frozen=True, slots=True)
class _Place:
    """A place that is waiting for a group: whose it is, and how often it has been refilled."""

    capability: str
    refills: int = 0


@dataclass(frozen=True, slots=True)
class _Undecided:
    stamp: int
    place: _Place | None  # None: a spare
    capability: str
    is_ready: bool = False


class StalenessQueue:
    """Admits groups, takes their results, and forms batches of `groups_per_step` in dispatch order.

    shares: of each capability, 1 in all. refills: how often a place is refilled before another capability takes it.
    version: at which the first batch will be trained. first_order: the dispatch order of the next new group.
    over_provision: spare groups, in batches.
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
        self._shares = shares
        self._refills = refills
        self._mode = mode
        self._most_spares = 0 if max_staleness else int(over_provision * groups_per_step)
        self._spares_coming = places(shares)
        self._drop_rate = 0.0
        self._decided: Counter[bool] = Counter()  # since the last batch: dropped, or not
        self._version = version  # of the next batch
        self._coming = places(shares, version * groups_per_step)
        self._num_given = version * groups_per_step
        self._places: dict[int, Counter[str]] = {}  # of batches that are not trained yet
        self._free: list[_Place] = []
        self._lent: Counter[str] = Counter()
        self._undecided: dict[int, _Undecided] = {}
        self._num_ready = 0
        self._next_order = first_order

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
        return self._lent.total()

    @property
    def next_order(self) -> int:
        """The dispatch order of the next new group."""
        return self._next_order

    def holds(self, order: int) -> bool:
        """Whether a group is admitted and not decided."""
        return order in self._undecided

    def room(self, engine_version: int) -> int:
        """How many groups may be admitted now; engine_version: the oldest that an engine may still sample with."""
        return self._places_left(engine_version) or self._spares_left()

    def _places_left(self, engine_version: int) -> int:
        version = engine_version
        if self._mode == "drop":
            if engine_version + self._max_staleness < self._version:
                return 0  # it would be too old at once
            version = self._version
        return max(0, (version + self._max_staleness + 1) * self._batch - self._num_given + len(self._free))

    def _spares_left(self) -> int:
        if not self._most_spares:
            return 0
        placed = sum(not item.is_ready and item.place is not None for item in self._undecided.values())
        wanted = math.ceil(placed * self._drop_rate / (1 - self._drop_rate)) if self._drop_rate < 1 else placed
        return max(0, min(wanted, self._most_spares) - self.num_spares)

    @property
    def num_spares(self) -> int:
        """Groups without a place."""
        return sum(item.place is None for item in self._undecided.values())

    def admit(self, engine_version: int, choose: Callable[[str], int | None] | None = None) -> tuple[int, str]:
        """Take a place; returns the group's dispatch order and the capability that its prompt must have.

        choose: gives the order of a group of a capability that was admitted before a crash, if there is one.
        """
        place = None
        if self._places_left(engine_version):
            if not self._free:
                self._give_place()
            place = self._free.pop()
        capability = place.capability if place is not None else next(self._spares_coming)
        order = choose(capability) if choose is not None else None
        if order is None:
            order = self._next_order
            self._next_order += 1
        self._undecided[order] = _Undecided(engine_version, place, capability)
        return order, capability

    def adopt(self, order: int, capability: str, stamp: int, *, is_ready: bool) -> bool:
        """Let a group from before a crash take a place again; False if no place is early enough for it.

        Groups are adopted before any is admitted, those with the lowest `stamp` first.
        """
        last_chance = stamp + self._max_staleness
        end = (last_chance + 1) * self._batch
        while last_chance >= self._version and self._num_given < end and not self._has_free(capability):
            self._give_place()
        if last_chance < self._version or not self._free:
            return False
        if not self._has_free(capability):
            taken = self._free.pop()
            self._move_place(taken.capability, capability)
            self._free.append(_Place(capability))
        index = next(index for index, place in enumerate(self._free) if place.capability == capability)
        self._undecided[order] = _Undecided(stamp, self._free.pop(index), capability, is_ready)
        self._num_ready += is_ready
        return True

    def _has_free(self, capability: str) -> bool:
        return any(place.capability == capability for place in self._free)

    def _give_place(self) -> None:
        """The next place of all batches is free from now on."""
        place = _Place(next(self._coming))
        self._places.setdefault(self._num_given // self._batch, Counter())[place.capability] += 1
        self._num_given += 1
        self._free.append(place)

    def ready(self, order: int) -> None:
        """The group has been sampled and scored, and is worth training on."""
        item = self._undecided[order]
        self._decided[False] += 1
        self._undecided[order] = _Undecided(item.stamp, item.place, item.capability, True)
        self._num_ready += not item.is_ready

    def drop(self, order: int) -> None:
        """The group teaches nothing; its place goes to a spare of its capability, or is free."""
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
        others = [name for name in self._shares if name != place.capability]
        if heir is not None:
            self._undecided[heir] = replace(self._undecided[heir], place=_Place(place.capability, place.refills + 1))
        elif place.refills < self._refills or not others:
            self._free.append(_Place(place.capability, place.refills + 1))
        else:
            self._free.append(_Place(self._lend(place.capability, others)))

    def _lend(self, capability: str, others: list[str]) -> str:
        """Give a place of a capability to the one of the others that has had the least of such places.

        It is the capability's last place: earlier ones may be needed by groups of it that are in flight.
        """
        total = self._lent.total() + 1
        heir = max(others, key=lambda name: (self._shares[name] * total - self._lent[name], name))
        self._lent[heir] += 1
        self._move_place(capability, heir)
        return heir

    def _move_place(self, capability: str, heir: str) -> None:
        last = max(version for version, counts in self._places.items() if counts[capability])
        self._places[last][capability] -= 1
        self._places[last][heir] += 1

    def take(self, version: int) -> list[int] | None:
        """The next batch, to be trained at `version`, in dispatch order; None while it is not complete."""
        wanted = self._places.get(version, Counter())
        if wanted.total() < self._batch or self._num_ready < self._batch:  # asked at every change: first what is cheap
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
        del self._places[version]
        self._version = version + 1
        if total := self._decided.total():
            self._drop_rate = (self._drop_rate + self._decided[True] / total) / 2
            self._decided.clear()
        return sorted(batch)

    def expired(self) -> list[int]:
        """Groups that are too old for every batch to come: spares, and in mode `drop` any."""
        return [order for order, item in self._undecided.items() if item.stamp + self._max_staleness < self._version]

    def _fit(self, capability: str, last_chances: list[int], version: int) -> bool:
        """True if all groups that are left find a place in the batches after `version`, up to their last chances."""
        room, num_due = 0, Counter(last_chances)
        for last_chance in range(version, version + self._max_staleness):
            if last_chance > version:
                room += self._places.get(last_chance, Counter())[capability]
            if sum(count for chance, count in num_due.items() if chance <= last_chance) > room:
                return False
        return True
