"""Which prompt of a quota is drawn next: one whose group will probably have an advantage.

A group teaches if its rewards differ, so a prompt is worth the chance that its replies are mixed: 1 - p^G - (1 - p)^G
for the pass rate p and G replies. p is not known. So for each prompt NUM_DRAWS pass rates are drawn from the belief
about it (beliefs.py), and the prompts with the highest mean chance come first. A prompt of which little is known is
sometimes drawn high, which explores; the mean of several draws explores less than a single one (Thompson sampling).

The same few prompts again and again teach less than others as likely to be mixed. So a prompt's chance is divided by
1 + WEAR n, where n is the number of groups that the belief about it counts. It is the lower, the longer ago they were.

A prompt rests after it was drawn, until a quarter as many others were drawn as there are prompts that would give a
mixed group, by the beliefs. So prompts that are known to teach do not crowd out those that were not tried.

Every draw depends on the seed, the dispatch order of the group, and the beliefs. The slate, which is the list of the
prompts to be drawn next, is made anew after each optimizer step.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.data.arrays import blocks, where, zeros
from posttrain.rl.prompts.beliefs import Beliefs, mixed_chance
from posttrain.rl.prompts.quotas import Modalities

NUM_DRAWS = 4
# Of a larger pool, a slate is chosen among so many prompts that were picked at random, half of them among those seen.
CANDIDATES = 4096
SLATE = 32
REST = 0.25
WEAR = 0.25
RENEWAL = 0.02  # the weight of the newest group in the mean of trained groups for each reply


class Selection:
    """Draws prompts by `beliefs` about them. group_size: the number of replies in a group.

    modalities: see `quota_of`. members: the places of the prompts of each quota, by name.
    """

    def __init__(self, beliefs: Beliefs, *, group_size: int, seed: int, modalities: Modalities | None = None):
        self.beliefs = beliefs
        self._group_size = group_size
        self._seed = seed
        self.members = beliefs.of_quotas(modalities)
        self._drawn_at_N = zeros(len(beliefs.place), np.int64)  # the number of the last draw, from 1; 0: never drawn
        self._slates: dict[str, list[int]] = {}
        self._useful_a_reply = 1 / (4 * group_size)  # groups that were trained on, for each sampled reply
        self._num_mixed = self._expected_mixed()

    def draw(self, quota: str, order: int, number: int) -> int:
        """The place of the prompt for the group with the dispatch order `order`. number: of draws of the quota."""
        if not self._slates.get(quota):
            self._slates[quota] = self._slate(quota, order, number)
        place = self._slates[quota].pop()
        self._drawn_at_N[place] = number
        return place

    def was_drawn(self, prompt_id: str, number: int) -> None:
        """Note that a prompt was the draw number `number` of its quota (from 1), before a crash."""
        place = self.beliefs.place[prompt_id]
        self._drawn_at_N[place] = max(self._drawn_at_N[place], number)

    def decided(self, replies: int, *, is_useful: bool) -> None:
        """Count a group with so many replies. is_useful: whether it is to be trained on."""
        self._useful_a_reply += RENEWAL * (is_useful - self._useful_a_reply * replies) / self._group_size

    def may_stop(self, prompt_id: str, first: int) -> bool:
        """Whether equal rewards of its first replies could end a group. Otherwise no reply need wait for them."""
        place = self.beliefs.place[prompt_id]
        return not (self._goes_on(place, first, 0) and self._goes_on(place, 0, first))

    def goes_on(self, prompt_id: str, passes: int, failures: int) -> bool:
        """Whether a group whose first replies got equal rewards is sampled to its end.

        It is if the chance that it becomes mixed, for each reply that is left, is at least the groups trained on for
        each reply so far: sampling another prompt would not bring more (the marginal value theorem).
        """
        return self._goes_on(self.beliefs.place[prompt_id], passes, failures)

    def _goes_on(self, place: int, passes: int, failures: int) -> bool:
        left = self._group_size - passes - failures
        a, b = self.beliefs.shape(place)
        a, b = a + passes, b + failures
        as_before = a if passes > failures else b
        equal = math.prod((as_before + seen) / (a + b + seen) for seen in range(left))
        return (1 - equal) / left >= self._useful_a_reply

    def advance(self, version: int) -> None:
        """Take account of what was seen before the step that made `version`."""
        self.beliefs.advance(version)
        self._slates.clear()
        self._num_mixed = self._expected_mixed()

    def figures(self) -> dict[str, float]:
        """For the metrics of a step: prompts that were seen, and how many would give a mixed group, by the beliefs."""
        return {"prompts_seen": self.beliefs.num_seen, "prompts_mixed": sum(self._num_mixed.values())}

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint, right after `advance`. `was_drawn` brings back the rest."""
        return {**self.beliefs.state(), "useful_a_reply": self._useful_a_reply}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.beliefs.restore(state)
        self._useful_a_reply = state["useful_a_reply"]
        self._slates.clear()
        self._num_mixed = self._expected_mixed()

    def _expected_mixed(self) -> dict[str, float]:
        def expected(places: np.ndarray) -> float:
            return float(mixed_chance(*self.beliefs.shapes(places), self._group_size).sum())

        return {name: sum(map(expected, blocks(members))) for name, members in self.members.items()}

    def _slate(self, quota: str, order: int, number: int) -> list[int]:
        """The places of the prompts to be drawn next, the best one last."""
        members = self.members[quota]
        rng = np.random.default_rng([self._seed, zlib.crc32(quota.encode()), order])

        def has_rested(places: np.ndarray) -> np.ndarray:
            drawn_at = self._drawn_at_N[places]
            return (drawn_at == 0) | (number - drawn_at > REST * self._num_mixed[quota])

        able = where(members, has_rested)
        if not able.size:  # all were drawn lately: the ones that were drawn first
            able = members[np.argsort(self._drawn_at_N[members], kind="stable")[: max(1, members.size // 2)]]
        if able.size > CANDIDATES:
            seen = where(able, self.beliefs.is_seen)
            some = [among[rng.integers(0, among.size, CANDIDATES // 2)] for among in (able, seen) if among.size]
            able = np.unique(np.concatenate(some))
        a, b = self.beliefs.shapes(able)
        rates = rng.beta(a, b, size=(NUM_DRAWS, able.size))
        chance = (1 - rates**self._group_size - (1 - rates) ** self._group_size).mean(axis=0)
        chance /= 1 + WEAR * self.beliefs.num_replies(able) / self._group_size
        best = np.argsort(-chance, kind="stable")[:SLATE]
        return able[best][::-1].tolist()
