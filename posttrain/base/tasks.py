"""The puzzles of the quick start: five families with five levels each, and functions that draw distinct problems.

Those of the pipeline `tools` are in tools/; they are drawn and solved by the same functions.

In these puzzles work pays: a reply that shows its steps is right far more often than a terse one. But the base model
mostly gives terse replies. Reinforcement learning can find out that showing the steps is better.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from posttrain.base.families.countdown import COUNTDOWN
from posttrain.base.families.edits import EDITS
from posttrain.base.families.programs import PROGRAMS
from posttrain.base.families.sorting import SORTING
from posttrain.base.families.sums import SUMS
from posttrain.base.problem import LEVELS, Family, Problem, Solution
from posttrain.errors import DataError

_TRIES = 5_000

FAMILIES: dict[str, Family] = {
    "sum": SUMS,
    "code": PROGRAMS,
    "sort": SORTING,
    "string": EDITS,
    "countdown": COUNTDOWN,
}


@dataclass(frozen=True, slots=True)
class Habit:
    """How often replies to a family of puzzles show their steps, in the later training text and in the examples.

    worked: share of replies that show their steps. careless: share of the terse replies that skip the work.
    """

    worked: float
    careless: float


HABITS: dict[str, Habit] = {
    "sum": Habit(worked=0.2, careless=0.05),
    "code": Habit(worked=0.2, careless=0.05),
    "sort": Habit(worked=0.2, careless=0.35),
    "string": Habit(worked=0.9, careless=1.0),
    "countdown": Habit(worked=0.2, careless=0.7),
}


@dataclass(frozen=True, slots=True)
class Puzzles:
    """The families of a pipeline and the habits of its base model, both by family."""

    families: Mapping[str, Family]
    habits: Mapping[str, Habit]


ANSWERS = Puzzles(FAMILIES, HABITS)


def draw_distinct(
    count: int,
    rng: random.Random,
    taken: Collection[str] = (),
    *,
    level_weights: Sequence[float] | None = None,
    puzzles: Puzzles = ANSWERS,
) -> list[Problem]:
    """`count` problems with distinct keys, none of which is in `taken`.

    Families are drawn from in turn. Levels are drawn by weight, or evenly without weights. Raises `DataError` if a
    family has no more problems.
    """
    names, seen, problems = list(puzzles.families), set(taken), list[Problem]()
    while len(problems) < count:
        family = names[len(problems) % len(names)]
        problem = _draw(family, rng, seen, level_weights=level_weights, puzzles=puzzles)
        seen.add(problem.key)
        problems.append(problem)
    return problems


def draw_any(
    rng: random.Random,
    taken: Collection[str],
    level_weights: Sequence[float] | None = None,
    *,
    puzzles: Puzzles = ANSWERS,
) -> Problem:
    """One problem of any family whose key is not in `taken`. Raises `DataError` if none is found."""
    return _draw(rng.choice(list(puzzles.families)), rng, taken, level_weights=level_weights, puzzles=puzzles)


def _draw(
    family: str, rng: random.Random, taken: Collection[str], *, level_weights: Sequence[float] | None, puzzles: Puzzles
) -> Problem:
    for _ in range(_TRIES):
        problem = puzzles.families[family].draw(rng.choices(LEVELS, level_weights)[0], rng)
        if problem.key not in taken:
            return problem
    raise DataError(
        f"{len(taken)} puzzles are taken and family {family!r} has no other; make `sets` of the base smaller"
    )


def solve(
    problem: Problem, rng: random.Random, worked: bool, *, flaw: float = 0.0, puzzles: Puzzles = ANSWERS
) -> Solution:
    """A reply to the problem: its steps or the answer alone; with chance `flaw` it has a slip or is careless."""
    family = puzzles.families[problem.family]
    return (family.worked if worked else family.terse)(problem, rng, rng.random() < flaw)
