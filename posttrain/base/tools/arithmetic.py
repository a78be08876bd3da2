"""Arithmetic with a calculator. The two easy levels can be done in the head, the others need a call."""

import random

from posttrain.base.problem import Family, Problem, Solution
from posttrain.base.tools.turns import answer, broken_call, called, schema

CALCULATOR = schema("calculate", "expression", "Compute an arithmetic expression.")
_IN_THE_HEAD = 2  # the hardest level that is


def draw(level: int, rng: random.Random) -> Problem:
    """A sum or difference with a small number; from level 3 on products of growing size."""
    a, b, c = rng.randint(11, 90), rng.randint(11, 90), rng.randint(2, 9)
    text, value = [
        (f"{a} + {c}", a + c),
        (f"{a} - {c}", a - c),
        (f"{a} * {c}", a * c),
        (f"{a} * {b}", a * b),
        (f"{a} * {b} + {c}", a * b + c),
    ][level - 1]
    return Problem("arithmetic", level, f"Compute: {text}", str(value), f"arithmetic {text}", (text, value), {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> Solution:
    """Call the calculator, then answer. A slip breaks the call; half of the time it then answers from the head."""
    text, value = problem.parts
    turns = broken_call(CALCULATOR, text) if slip else []
    if slip and rng.random() < 0.5:
        return [*turns, answer(_guess(problem, rng))]
    return [*turns, *called(CALCULATOR, text, str(value)), answer(value)]


def terse(problem: Problem, rng: random.Random, careless: bool) -> Solution:
    """Answer from the head: right at the easy levels, unless careless."""
    off = rng.choice((-1, 1)) if careless and problem.level <= _IN_THE_HEAD else 0
    return [answer(_guess(problem, rng) + off)]


def _guess(problem: Problem, rng: random.Random) -> int:
    """The value if the head can do it, else a number of as many digits."""
    digits = len(problem.answer)
    return problem.parts[1] if problem.level <= _IN_THE_HEAD else rng.randrange(10 ** (digits - 1), 10**digits)


ARITHMETIC = Family("arithmetic", draw, worked, terse, (CALCULATOR,))
