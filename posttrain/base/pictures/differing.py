"""Which of three to eight pictures has another colour. The work is to say the colour of each."""

import random

from posttrain.base.pictures.drawing import COLOURS, EMPTY, NAMES, draw_cells, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

MAX_PICTURES = 8
_LEAST = 2  # less than the pictures of the first level
_COLOURED = (3, 6)  # cells of a picture, least and most


def draw(level: int, rng: random.Random) -> Problem:
    """`level` + 2 or + 3 pictures, each with cells of one colour."""
    count = level + _LEAST + rng.randint(0, 1)
    common, other = rng.sample(list(COLOURS), 2)
    place = rng.randrange(count)
    scenes = tuple(_scene(other if at == place else common, rng) for at in range(count))
    prompt = "Which differs"
    return Problem("differ", level, prompt, str(place + 1), scene_key(prompt, scenes), scenes, {})


def _scene(colour: str, rng: random.Random) -> tuple[int, tuple[str, ...]]:
    """The ground, and the colours of the cells."""
    count = rng.randint(*_COLOURED)
    colours = [colour] * count + [EMPTY] * (len(NAMES) - count)
    rng.shuffle(colours)
    return random_ground(rng), tuple(colours)


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """The colours in order, then the number of the picture; a slip takes another one."""
    colours = [next(colour for colour in cells if colour != EMPTY) for _, cells in problem.parts]
    steps = [f"{number} {colour}" for number, colour in enumerate(colours, start=1)]
    return with_steps(steps, str(rng.randint(1, len(colours))) if slip else problem.answer, separator=" ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The number at once; a careless one takes any."""
    return f"Answer: {rng.randint(1, len(problem.parts)) if careless else problem.answer}"


def pictures(problem: Problem) -> list[Picture]:
    """All of them, in order."""
    return [draw_cells(*scene) for scene in problem.parts]


DIFFERING = Family("comparison", draw, worked, terse, pictures=pictures)
