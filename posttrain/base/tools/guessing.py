"""A number to guess in five turns: after each the user says whether it is higher or lower. Halving always finds it."""

import random

from posttrain.base.problem import Family, Problem, Solution
from posttrain.base.tools.turns import heard

TURNS = 5
WIDTH = 2**TURNS - 1  # how many numbers there are
_STEP = 5  # between the lowest numbers of two ranges
_LARGEST = 99


def draw(level: int, rng: random.Random) -> Problem:
    """A range, which the prompt tells, and the number, which it does not. All levels are equal."""
    low = rng.randrange(1, _LARGEST - WIDTH + 2, _STEP)
    secret = rng.randrange(low, low + WIDTH)
    return Problem(
        family="guessing",
        level=level,
        prompt=f"Guess from {low} to {low + WIDTH - 1}",
        answer=str(secret),
        key=f"guessing {low} {secret}",
        parts=(low, secret),
        fields={},
    )


def worked(problem: Problem, rng: random.Random, slip: bool) -> Solution:
    """Halve what is left. A slip takes another number of it once."""
    low, secret = problem.parts
    high, guesses = low + WIDTH - 1, list[int]()
    slip_at = rng.randrange(TURNS) if slip else -1
    while len(guesses) < TURNS and secret not in guesses:
        guesses.append(rng.randint(low, high) if len(guesses) == slip_at else (low + high) // 2)
        low, high = (low, guesses[-1] - 1) if guesses[-1] > secret else (guesses[-1] + 1, high)
    return _played(guesses, secret)


def terse(problem: Problem, rng: random.Random, careless: bool) -> Solution:
    """Count from the lowest number on, whatever is heard. A careless one takes any number of the range each time."""
    low, secret = problem.parts
    numbers = rng.sample(range(low, low + WIDTH), TURNS) if careless else list(range(low, low + TURNS))
    return _played(numbers[: numbers.index(secret) + 1] if secret in numbers else numbers, secret)


def _played(guesses: list[int], secret: int) -> Solution:
    hints = ["higher" if guess < secret else "lower" for guess in guesses]
    return heard([str(guess) for guess in guesses], hints)


GUESSING = Family("guessing", draw, worked, terse)
