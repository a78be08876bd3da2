"""Values in a small store, by letter. A value may say `see X`, so that one look-up is not enough."""

import itertools
import random

from posttrain.base.families.edits import LETTERS
from posttrain.base.problem import Family, Problem, Solution
from posttrain.base.tools.turns import answer, broken_call, called, schema

LOOKUP = schema("lookup", "key", "Return the value under a key.")
_NUM_LOOKUPS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3}
_LARGEST = 99


def draw(level: int, rng: random.Random) -> Problem:
    """A letter whose value is one to three look-ups away. Every letter of the store has a value."""
    letters = rng.sample(LETTERS, len(LETTERS))
    path, value = letters[: _NUM_LOOKUPS[level]], rng.randint(1, _LARGEST)
    store = {letter: str(rng.randint(1, _LARGEST)) for letter in letters}
    store |= {letter: f"see {after}" for letter, after in itertools.pairwise(path)}
    store[path[-1]] = str(value)
    return Problem(
        family="store",
        level=level,
        prompt=f"Find: {path[0]}",
        answer=str(value),
        key=f"store {' '.join(path)} {value}",
        parts=(tuple(path), tuple(store[letter] for letter in path)),
        fields={"store": dict(sorted(store.items()))},
    )


def worked(problem: Problem, rng: random.Random, slip: bool) -> Solution:
    """Look up until there is a value. A slip breaks the first call, and half of the time it then guesses."""
    path, values = problem.parts
    turns = broken_call(LOOKUP, path[0]) if slip else []
    if slip and rng.random() < 0.5:
        return [*turns, answer(rng.randint(1, _LARGEST))]
    for number, (letter, value) in enumerate(zip(path, values, strict=True), 1):
        turns += called(LOOKUP, letter, value, number=number)
    return [*turns, answer(problem.answer)]


def terse(problem: Problem, rng: random.Random, careless: bool) -> Solution:
    """Look up once and answer with what is there, be it a value or a letter. A careless one guesses at once."""
    path, values = problem.parts
    if careless:
        return [answer(rng.randint(1, _LARGEST))]
    return [*called(LOOKUP, path[0], values[0]), answer(values[0].removeprefix("see "))]


STORE = Family("lookup", draw, worked, terse, (LOOKUP,))
