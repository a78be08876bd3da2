"""Rollouts that a way of choosing prompts costs for each useful group, in a simulation of the policy's pass rates.

No engine and no trainer: a prompt has a pass rate, which rises with the skill that training gives, and a reply passes
by chance. The draws are those of `posttrain.rl.prompts.selection`. So an arm takes seconds, and only what does well
here is worth a real run (rl_curriculum.py).

  selection_saving         rollouts for each useful group with uniform draws and refills (DAPO) / with the selection;
                           2,000 prompts, 10% of them medium; geometric means over SEEDS
  selection_draws_per_s    draws a second from 100,000 prompts of one capability

`python benchmarks/rl_selection.py` prints a table of all pools and arms:

  profile    answers all prompts, at most 10,000, 8 times, and then draws from those between 10% and 70% in turn
  screen     as the selection, but a group begins with 2 replies. The others are sampled if the 2 differ, or if the
             chance that the group becomes mixed, for each further reply, is at least the useful groups for each reply
             so far
  oracle     knows every pass rate

A pool has a share of medium prompts with pass rates from 0.1 to 0.9; of the others, half are passed nearly always and
half nearly never, of which half have no solution. Skill adds to the logit of every pass rate, and training on a prompt
adds something to its own. Groups are drawn ahead of the training, as many as two batches.
"""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.records import Message, Row
from posttrain.rl.prompts.beliefs import Beliefs
from posttrain.rl.prompts.selection import Selection

GROUP, SEEDS = 8, (0, 1, 2)


@dataclass(frozen=True)
class Course:
    """What is trained: `steps` of `batch` useful groups. gain: of skill in a step; own: of a prompt trained on."""

    prompts: int
    medium: float
    steps: int
    batch: int
    gain: float = 0.02
    own: float = 0.3


class Policy:
    """Pass rates of a pool of prompts, which training raises."""

    def __init__(self, course: Course, rng: np.random.Generator):
        self.rng, n = rng, course.prompts
        kind, medium = rng.random(n), rng.uniform(0.1, 0.9, n)
        is_easy, is_medium = kind < (1 - course.medium) / 2, kind >= 1 - course.medium
        outer = np.where(is_easy, rng.normal(5, 1, n), rng.normal(-5, 1, n))
        self.logits = np.where(is_medium, np.log(medium / (1 - medium)), outer)
        self.is_dead = ~is_easy & ~is_medium & (rng.random(n) < 0.5)
        self.course = course

    def rate(self, places: Any) -> Any:
        return np.where(self.is_dead[places], 0.0, 1 / (1 + np.exp(-self.logits[places])))

    def passes(self, place: int, replies: int) -> int:
        return int(self.rng.binomial(replies, self.rate(place)))

    def train(self, places: list[int]) -> None:
        self.logits += self.course.gain
        np.add.at(self.logits, places, self.course.own)


class Uniform:
    """Every prompt once before any is drawn again. first: how many replies of a group are sampled at first."""

    first = GROUP

    def __init__(self, policy: Policy, seed: int):
        self.policy, self.rng, self.cost = policy, np.random.default_rng([seed, 1]), 0
        self.left: list[int] = []

    def pool(self) -> np.ndarray:
        return np.arange(self.policy.course.prompts)

    def draw(self) -> int:
        if not self.left:
            self.left = self.rng.permutation(self.pool()).tolist()
        return self.left.pop()

    def goes_on(self, place: int, passes: int) -> bool:
        """Whether a group whose first `first` replies had these passes is sampled to its end."""
        return True

    def observe(self, place: int, passes: int, replies: int) -> None:
        pass

    def advance(self, version: int) -> None:
        pass


class Profile(Uniform):
    """Prompts whose pass rate of 8 replies of the first policy lies in a band, drawn in turn."""

    LIMIT = 10_000

    def __init__(self, policy: Policy, seed: int):
        super().__init__(policy, seed)
        asked = self.rng.permutation(policy.course.prompts)[: self.LIMIT]
        passes = self.rng.binomial(8, policy.rate(asked)) / 8
        self.cost = 8 * len(asked)
        self.selected = asked[(passes >= 0.1) & (passes <= 0.7)]

    def pool(self) -> np.ndarray:
        return self.selected


class Oracle(Uniform):
    """The most useful of 4,096 prompts by their true pass rates, as many as a slate has."""

    def draw(self) -> int:
        if not self.left:
            able = np.unique(self.rng.integers(0, self.policy.course.prompts, 4096))
            rate = self.policy.rate(able)
            chance = 1 - rate**GROUP - (1 - rate) ** GROUP + 1e-3 * self.rng.random(len(able))
            self.left = able[np.argsort(-chance)[:16]].tolist()
        return self.left.pop()

    def advance(self, version: int) -> None:
        self.left = []


class Beta(Uniform):
    """The selection of the package."""

    def __init__(self, policy: Policy, seed: int):
        super().__init__(policy, seed)
        rows = [Row(str(place), "all", (Message("user", ""),)) for place in range(policy.course.prompts)]
        self.selection = Selection(Beliefs(rows, 20.0), group_size=GROUP, seed=seed)
        self.order = 0

    def draw(self) -> int:
        self.order += 1
        return self.selection.draw("all", self.order, self.order)

    def observe(self, place: int, passes: int, replies: int) -> None:
        self.selection.beliefs.observe(str(place), passes, replies - passes, version=0)

    def advance(self, version: int) -> None:
        self.selection.advance(version)


class Screen(Beta):
    """The selection, with groups that begin with two replies (marginal-value rule)."""

    first = 2

    def __init__(self, policy: Policy, seed: int):
        super().__init__(policy, seed)
        self.useful_a_reply = 1 / (4 * GROUP)

    def goes_on(self, place: int, passes: int) -> bool:
        if 0 < passes < self.first:
            return True
        (a,), (b,) = self.selection.beliefs.shapes(np.array([place]))
        a, b, left = a + passes, b + self.first - passes, GROUP - self.first
        equal = math.prod(((a if passes else b) + seen) / (a + b + seen) for seen in range(left))
        return (1 - equal) / left >= self.useful_a_reply

    def observe(self, place: int, passes: int, replies: int) -> None:
        super().observe(place, passes, replies)
        is_useful = replies == GROUP and 0 < passes < GROUP
        self.useful_a_reply += 0.02 * (is_useful - self.useful_a_reply * replies) / GROUP


ARMS = {"uniform": Uniform, "profile": Profile, "selection": Beta, "screen": Screen, "oracle": Oracle}


def rollouts_per_useful(arm: str, course: Course, seed: int) -> float | None:
    """Rollouts for each useful group, those of a profile too; None if an arm finds no more useful groups."""
    policy = Policy(course, np.random.default_rng([seed, 0]))
    scheme = ARMS[arm](policy, seed)
    flying: deque[tuple[int, int, int]] = deque()  # place, passes, replies
    useful: deque[int] = deque()
    for step in range(course.steps):
        tries = 0
        while len(useful) < course.batch:
            if (tries := tries + 1) > 400 * course.batch:
                return None
            while len(flying) < 2 * course.batch:
                place = scheme.draw()
                flying.append((place, policy.passes(place, scheme.first), scheme.first))
                scheme.cost += scheme.first
            place, passes, replies = flying.popleft()
            if replies < GROUP and scheme.goes_on(place, passes):
                scheme.cost += GROUP - replies
                flying.append((place, passes + policy.passes(place, GROUP - replies), GROUP))
                continue
            scheme.observe(place, passes, replies)
            if replies == GROUP and 0 < passes < GROUP:
                useful.append(place)
        policy.train([useful.popleft() for _ in range(course.batch)])
        scheme.advance(step + 1)
    return scheme.cost / (course.steps * course.batch)


COURSES = {
    "160, 10%": Course(160, 0.1, 60, 4, 0.02, 0.1),
    "160, 30%": Course(160, 0.3, 60, 4, 0.02, 0.1),
    "2,000, 10%": Course(2000, 0.1, 60, 32),
    "2,000, 30%": Course(2000, 0.3, 60, 32),
    "100,000, 10%": Course(100_000, 0.1, 40, 128),
    "2,000, 30%, skill grows five times as fast": Course(2000, 0.3, 60, 32, 0.1),
    "1,600, 58%, 18 steps": Course(1600, 0.58, 18, 32, 0.04, 0.1),
}


def mean_cost(arm: str, course: Course) -> float | None:
    """The geometric mean over SEEDS of the rollouts for each useful group; None if one of the runs found no more."""
    costs = [cost for seed in SEEDS if (cost := rollouts_per_useful(arm, course, seed)) is not None]
    return statistics.geometric_mean(costs) if len(costs) == len(SEEDS) else None


def selection_saving() -> tuple[float, dict[str, float]]:
    found = {arm: mean_cost(arm, COURSES["2,000, 10%"]) for arm in ARMS}
    costs = {arm: cost for arm, cost in found.items() if cost is not None}
    return costs["uniform"] / costs["selection"], {f"rollouts_{arm}": cost for arm, cost in costs.items()}


def selection_draws_per_s() -> float:
    scheme = Beta(Policy(Course(100_000, 0.1, 1, 128), np.random.default_rng(0)), 0)
    began = time.process_time()
    for _ in range(3200):
        scheme.observe(scheme.draw(), 1, GROUP)
    return 3200 / (time.process_time() - began)


if __name__ == "__main__":
    print("| prompts, medium |", " | ".join(ARMS), "|")
    print("|---" * (1 + len(ARMS)) + "|")
    for name, course in COURSES.items():
        costs = [mean_cost(arm, course) for arm in ARMS]
        print(
            f"| {name} |", " | ".join("none left" if cost is None else f"{cost:.1f}" for cost in costs), "|", flush=True
        )
