"""The places of the batches to come. A group needs one to be admitted to the queue (staleness.py).

A batch consists of `groups_per_step` places. Each place belongs to a capability, by the shares of the mixture
(quotas.py). Places are given out in the order of the batches. If a group is dropped, its place becomes free for another
group of the same capability. After a place has been refilled `refills` times and lost its group again, it is lent to
another capability. So a capability whose prompts teach nothing cannot hold up a batch for ever.

Example. With shares of 1/2 for `math` and `code` and 2 places in a batch, each batch has one place for `math`. With
`refills` = 3, a place of `math` that has lost 4 groups goes to `code`: the latest batch that had a place for `math`
then has two for `code`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from msgspec import Struct

from posttrain.rl.prompts.quotas import places, scattered


class Place(Struct, frozen=True):
    """A place of a batch, the capability that it belongs to, and how often it has been refilled."""

    capability: str
    refills: int = 0

    def refilled(self) -> "Place":
        """The place after it has lost a group and stays with its capability."""
        return Place(self.capability, self.refills + 1)


class BatchPlaces:
    """The places of all batches from that of `version` on, of which each has `groups_per_step`.

    shares: the share of each capability; their sum is 1.
    """

    def __init__(self, groups_per_step: int, shares: Mapping[str, float], *, refills: int, version: int):
        self._batch = groups_per_step
        self._shares = shares
        self._refills = refills
        self._coming = places(shares, version * groups_per_step)
        self._num_given = version * groups_per_step
        # By version, for each batch that is not taken yet.
        self._of_batch: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._free: list[Place] = []
        self._lent: Counter[str] = Counter()

    @property
    def num_lent(self) -> int:
        """Places that have gone to another capability than the mixture's."""
        return self._lent.total()

    def move(self, shares: Mapping[str, float]) -> None:
        """Give out the places from the next one on by these shares."""
        self._shares = shares
        self._coming = scattered(shares, self._num_given)

    def num_left(self, last: int) -> int:
        """How many places are left in the batches up to version `last`."""
        return max(0, (last + 1) * self._batch - self._num_given + len(self._free))

    def of_batch(self, version: int) -> Counter[str]:
        """How many places that were given out in the batch of `version` belong to each capability."""
        return self._of_batch.get(version, Counter())

    def close(self, version: int) -> None:
        """Forget the batch of `version`, which has been taken."""
        del self._of_batch[version]

    def take(self) -> Place:
        """A free place, or else the next one of the batches."""
        if not self._free:
            self._give_out()
        return self._free.pop()

    def take_for(self, capability: str, last: int) -> Place | None:
        """A place for a group of this capability, in the batches up to version `last`; None if there is none."""
        end = (last + 1) * self._batch
        while self._num_given < end and not self._has_free(capability):
            self._give_out()
        if not self._free:
            return None
        if not self._has_free(capability):
            taken = self._free.pop()
            self._move(taken.capability, capability)
            return Place(capability)
        index = next(index for index, place in enumerate(self._free) if place.capability == capability)
        return self._free.pop(index)

    def give_back(self, place: Place) -> None:
        """Free the place of a dropped group, for its capability or, after `refills` groups, for another one."""
        others = [name for name in self._shares if name != place.capability]
        if place.refills < self._refills or not others:
            self._free.append(place.refilled())
        else:
            self._free.append(Place(self._lend(place.capability, others)))

    def _has_free(self, capability: str) -> bool:
        return any(place.capability == capability for place in self._free)

    def _give_out(self) -> None:
        """Make the next place free, in the order of the batches."""
        place = Place(next(self._coming))
        self._of_batch[self._num_given // self._batch][place.capability] += 1
        self._num_given += 1
        self._free.append(place)

    def _lend(self, capability: str, others: list[str]) -> str:
        """Give a place of a capability to another one, and return its name.

        It is the one that is furthest behind its share of all places that were given away so far. The place is the
        capability's latest, because groups of the capability that are in flight may need the earlier ones.
        """
        total = self._lent.total() + 1
        heir = max(others, key=lambda name: (self._shares[name] * total - self._lent[name], name))
        self._lent[heir] += 1
        self._move(capability, heir)
        return heir

    def _move(self, capability: str, heir: str) -> None:
        last = max(version for version, counts in self._of_batch.items() if counts[capability])
        self._of_batch[last][capability] -= 1
        self._of_batch[last][heir] += 1
