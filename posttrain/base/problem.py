"""One small puzzle, and what a family of puzzles provides. Nothing here knows of tokens or models."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Problem:
    """A puzzle with its right answer.

    family, level: where it comes from; level 1 is the easiest of five.
    prompt, answer: what is asked, and a right answer (the only one, except in countdown).
    key: the same for problems that are the same in another wording, such as "3 + 4" and "4 + 3".
    parts: what the family needs to write a solution.
    fields: further columns of the dataset row, which a reward needs.
    """

    family: str
    level: int
    prompt: str
    answer: str
    key: str
    parts: tuple[Any, ...]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of puzzles.

    draw: (level, rng) -> Problem. worked: (problem, rng, slip) -> the steps, then the answer; with `slip` one step goes
    wrong. terse: (problem, rng, careless) -> the answer alone; a careless one skips what takes effort.
    """

    capability: str
    draw: Callable[[int, random.Random], Problem]
    worked: Callable[[Problem, random.Random, bool], str]
    terse: Callable[[Problem, random.Random, bool], str]


def with_steps(steps: list[str], answer: str, separator: str = ", ") -> str:
    """A worked reply."""
    return f"Steps: {separator.join(steps)}. Answer: {answer}"
