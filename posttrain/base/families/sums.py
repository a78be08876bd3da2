"""Sums of two to six different numbers. The work is the running total."""

import random

from posttrain.base.problem import Family, Problem, with_steps

# The first number may be larger, or there would be too few short sums to keep the sets apart.
_LARGEST_FIRST = {1: 40, 2: 20, 3: 20, 4: 20, 5: 20}


def draw(level: int, rng: random.Random) -> Problem:
    """`level` + 1 numbers; all but the first have one digit."""
    first = rng.randint(1, _LARGEST_FIRST[level])
    numbers = [first, *rng.sample([digit for digit in range(1, 10) if digit != first], level)]
    return Problem(
        family="sum",
        level=level,
        prompt="Sum: " + " + ".join(map(str, numbers)),
        answer=str(sum(numbers)),
        key="sum " + " ".join(map(str, sorted(numbers))),
        parts=tuple(numbers),
        fields={},
    )


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Add one number at a time; a slip is off by one in one step."""
    total = problem.parts[0]
    slip_at = rng.randrange(1, len(problem.parts)) if slip else 0
    steps = []
    for index, number in enumerate(problem.parts[1:], start=1):
        after = total + number + (rng.choice((-1, 1)) if index == slip_at else 0)
        steps.append(f"{total} + {number} = {after}")
        total = after
    return with_steps(steps, str(total))


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The total at once; a careless one is off by one."""
    return f"Answer: {int(problem.answer) + (rng.choice((-1, 1)) if careless else 0)}"


SUMS = Family("math", draw, worked, terse)
