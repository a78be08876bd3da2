"""The seeds by which turns of the policy are drawn, where an environment or an agent gives one.

What is given is no seed by itself. An agent gives the same one in each episode, and mostly for each of its calls: the
episodes of a group would all be the same, and the turns of an episode would be drawn by the same chance. So a turn is
drawn by what is given, by the seed of its episode and by all that the policy has read.
"""

import hashlib
from collections.abc import Sequence

import msgspec


class TurnSeeds:
    """Those of one episode. seed: of the episode, the same whenever it is made again."""

    def __init__(self, seed: int):
        self._seed = seed
        self._drawn: frozenset[int] = frozenset()

    def of_turn(self, given: int | None, ids: Sequence[int]) -> tuple[int | None, bool]:
        """The seed of the engine's request for the turn after `ids`, and whether no turn was drawn by it before.

        A turn that repeats another one says nothing new about the policy: trained on, it would count twice.
        """
        if given is None:
            return None, True
        key = msgspec.msgpack.encode((self._seed, given, tuple(ids)))
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1  # for vLLM, of 63 bits
        is_new = seed not in self._drawn
        self._drawn |= {seed}
        return seed, is_new
