"""Several instructions at once on a row of letters. The work is to carry them out one after another."""

import random
from collections.abc import Sequence

from posttrain.base.problem import Family, Problem, with_steps

# In the order in which they are carried out.
INSTRUCTIONS = ("reverse", "upper", "double first", "drop last")
LETTERS = "abcdefghij"
_NUM_LETTERS = {1: (2, 3), 2: (2, 3), 3: (3, 4), 4: (3, 4), 5: (4, 5)}
_NUM_INSTRUCTIONS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3}


def edit(letters: Sequence[str], instructions: Sequence[str]) -> list[str]:
    """The letters after the instructions, whatever the order in which those are named."""
    edited = list(letters)
    if "reverse" in instructions:
        edited = edited[::-1]
    if "upper" in instructions:
        edited = [letter.upper() for letter in edited]
    if "double first" in instructions:
        edited = edited[:1] + edited
    if "drop last" in instructions:
        edited = edited[:-1]
    return edited


def draw(level: int, rng: random.Random) -> Problem:
    """Two to five different letters and one to three instructions."""
    letters = rng.sample(LETTERS, rng.choice(_NUM_LETTERS[level]))
    chosen = sorted(rng.sample(INSTRUCTIONS, _NUM_INSTRUCTIONS[level]), key=INSTRUCTIONS.index)
    text = f"{' '.join(letters)} ({', '.join(chosen)})"
    answer = " ".join(edit(letters, chosen))
    return Problem("string", level, f"Edit: {text}", answer, f"string {text}", (tuple(letters), tuple(chosen)), {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """The letters after each instruction; a slip forgets the last one."""
    letters, instructions = problem.parts
    steps = []
    for instruction in instructions[: len(instructions) - slip]:
        letters = edit(letters, [instruction])
        steps.append(f"{instruction}: {' '.join(letters)}")
    return with_steps(steps or ["none"], " ".join(letters), separator="; ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The result at once; a careless one carries out each instruction with even odds."""
    letters, instructions = problem.parts
    if careless:
        instructions = [instruction for instruction in instructions if rng.random() < 0.5]
    return "Answer: " + " ".join(edit(letters, instructions))


EDITS = Family("instruction_following", draw, worked, terse)
