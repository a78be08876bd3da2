"""The only cell of a colour. The work is to go through the cells in the order of reading."""

import random

from posttrain.base.pictures.drawing import EMPTY, NAMES, draw_cells, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_COLOURS = ("red", "green", "blue", "yellow")


def draw(level: int, rng: random.Random) -> Problem:
    """One cell of the colour, and `level` or one more cells of others."""
    wanted = rng.choice(_COLOURS)
    others = [colour for colour in _COLOURS if colour != wanted]
    rest = level + rng.randint(0, 1)
    colours = [wanted, *(rng.choice(others) for _ in range(rest)), *[EMPTY] * (len(NAMES) - 1 - rest)]
    rng.shuffle(colours)
    parts = (random_ground(rng), tuple(colours))
    prompt = f"Find {wanted}"
    return Problem("find", level, prompt, NAMES[colours.index(wanted)], scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Name the colour of each cell up to the one that was asked for; a slip answers with another."""
    steps = [f"{name} {colour}" for name, colour in zip(NAMES, problem.parts[1], strict=True)]
    steps = steps[: NAMES.index(problem.answer) + 1]
    return with_steps(steps, rng.choice(NAMES) if slip else problem.answer, separator=" ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The cell at once; a careless one takes any cell that has a colour."""
    coloured = [name for name, colour in zip(NAMES, problem.parts[1], strict=True) if colour != EMPTY]
    return f"Answer: {rng.choice(coloured) if careless else problem.answer}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_cells(*problem.parts)]


CELLS = Family("grounding", draw, worked, terse, pictures=pictures)
