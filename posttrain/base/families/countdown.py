"""Reach a target with + and - over all the given numbers. The work is to try and to check.

Solutions start with the largest number and go down, so that only the signs are to be found. Other orders may be right
as well.
"""

import random
from collections.abc import Sequence

from posttrain.base.problem import Family, Problem, with_steps

_NUM_NUMBERS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 4}
_LARGEST = {1: 15, 2: 25, 3: 9, 4: 12, 5: 9}
_MOST_WRONG_TRIES = 2


def draw(level: int, rng: random.Random) -> Problem:
    """Two to four different numbers and a target of at least 0 that they reach."""
    numbers = rng.sample(range(1, _LARGEST[level] + 1), _NUM_NUMBERS[level])
    expression, target = _attempt(numbers, rng)
    shown = " ".join(map(str, rng.sample(numbers, len(numbers))))
    return Problem(
        family="countdown",
        level=level,
        prompt=f"Make {target} from {shown}",
        answer=expression,
        key=f"countdown {target} from " + " ".join(map(str, sorted(numbers))),
        parts=(target, tuple(numbers), expression),
        fields={"numbers": sorted(numbers), "target": target},
    )


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Up to two tries that miss, then one that hits; a slip settles for a miss."""
    target, numbers, expression = problem.parts
    steps, last = [], expression
    for _ in range(rng.randint(0, _MOST_WRONG_TRIES)):
        attempt, value = _attempt(numbers, rng)
        if value == target:
            break
        steps.append(f"{attempt} = {value} no")
        if slip:
            steps[-1], last = f"{attempt} = {target} yes", attempt
            return with_steps(steps, last)
    steps.append(f"{expression} = {target} yes")
    return with_steps(steps, last)


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """An expression at once; a careless one is the first that comes to mind."""
    _target, numbers, expression = problem.parts
    return "Answer: " + (_attempt(numbers, rng)[0] if careless else expression)


def _attempt(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """A chain of random signs over the numbers from the largest down, of value at least 0."""
    while True:
        first, *rest = sorted(numbers, reverse=True)
        text, value = str(first), first
        for number in rest:
            sign = rng.choice((1, -1))
            text += f" {'+' if sign > 0 else '-'} {number}"
            value += sign * number
        if value >= 0:
            return text, value


COUNTDOWN = Family("math", draw, worked, terse)
