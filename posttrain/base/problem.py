"""The records of a puzzle and of a family of puzzles. Left out: tokens and models."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = (1, 2, 3, 4, 5)

Picture = NDArray[np.uint8]  # [height, width, 3]

# A solution of a puzzle: the text of one reply, or all turns after the prompt, as JSON messages.
Solution = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Problem:
    """A puzzle with its right answer.

    family: name in `tasks.FAMILIES`. level: 1 to 5; 1 is the easiest. prompt: the text of the question. answer: a right
    answer; only in countdown there may be others. key: equal for problems that differ only in their wording, such as
    "3 + 4" and "4 + 3". parts: the values from which the family writes a solution. fields: further columns of the
    dataset row, which a reward needs.
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

    draw: (level, rng) -> Problem. worked: (problem, rng, slip) -> a reply with the steps and then the answer; with
    `slip` one step is wrong. terse: (problem, rng, careless) -> a reply with the answer alone; a careless one skips the
    work. tools: schemas of the tools that the policy is shown with the prompt. pictures: (problem) -> what the prompt
    shows before its text.
    """

    capability: str
    draw: Callable[[int, random.Random], Problem]
    worked: Callable[[Problem, random.Random, bool], Solution]
    terse: Callable[[Problem, random.Random, bool], Solution]
    tools: tuple[dict[str, Any], ...] = ()
    pictures: "Callable[[Problem], list[Picture]] | None" = None


def with_steps(steps: list[str], answer: str, separator: str = ", ") -> str:
    """The text of a worked reply."""
    return f"Steps: {separator.join(steps)}. Answer: {answer}"


def turns_of(solution: Solution) -> list[dict[str, Any]]:
    """The turns of a solution, as JSON messages."""
    return [{"role": "assistant", "content": solution}] if isinstance(solution, str) else solution
