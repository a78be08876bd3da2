"""The sum of one to three digits in a picture. The work is to read them and to add one at a time."""

import random

from posttrain.base.pictures.drawing import CELLS, NAMES, draw_digits, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_ROW = NAMES[CELLS : 2 * CELLS]  # the middle one
_NUM_DIGITS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3}


def draw(level: int, rng: random.Random) -> Problem:
    """Digits from 1 to 9 beside each other."""
    count = _NUM_DIGITS[level]
    digits = tuple(rng.randint(1, 9) for _ in range(count))
    parts = (random_ground(rng), digits)
    prompt = "Add digits"
    return Problem("digits", level, prompt, str(sum(digits)), scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Read the digits, then add one at a time; a slip reads one wrongly."""
    digits = list(problem.parts[1])
    if slip:
        digits[rng.randrange(len(digits))] = rng.randint(1, 9)
    steps, total = [f"{name} {digit}" for name, digit in zip(_ROW, digits, strict=False)], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return with_steps(steps, str(total))


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The sum at once; a careless one is off by one."""
    return f"Answer: {int(problem.answer) + (rng.choice((-1, 1)) if careless else 0)}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_digits(*problem.parts)]


DIGITS = Family("reading", draw, worked, terse, pictures=pictures)
