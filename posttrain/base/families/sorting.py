"""Three to seven different numbers to be sorted up or down. The work is to say the direction first."""

import random

from posttrain.base.problem import Family, Problem, with_steps

_LARGEST = 12


def draw(level: int, rng: random.Random) -> Problem:
    """`level` + 2 different numbers and a direction."""
    numbers = rng.sample(range(1, _LARGEST + 1), level + 2)
    direction = rng.choice(("up", "down"))
    ordered = _ordered(numbers, direction)
    key = f"sort {direction} " + " ".join(map(str, sorted(numbers)))
    prompt = f"Sort {direction}: " + " ".join(map(str, numbers))
    return Problem("sort", level, prompt, ordered, key, (direction, tuple(numbers)), {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Restate the direction, then sort; a slip swaps two neighbours."""
    direction, numbers = problem.parts
    ordered = problem.answer.split()
    if slip:
        at = rng.randrange(len(numbers) - 1)
        ordered[at], ordered[at + 1] = ordered[at + 1], ordered[at]
    return with_steps([direction], " ".join(ordered))


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """Sort at once; a careless one sorts up, whatever was asked."""
    return "Answer: " + (_ordered(problem.parts[1], "up") if careless else problem.answer)


def _ordered(numbers: list[int] | tuple[int, ...], direction: str) -> str:
    return " ".join(map(str, sorted(numbers, reverse=direction == "down")))


SORTING = Family("reasoning", draw, worked, terse)
