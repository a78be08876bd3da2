"""Which of three to eight pictures has another colour than the first.

The work is to say the colour of each picture, and whether it is that of the first. A model of a million parameters
learns in the minutes that it has to name the colours, and not to find the only one of its kind among them: where any
place could be the odd one, and the work was the colours alone, RL left two of three seeds at chance.
"""

import random

from posttrain.base.pictures.drawing import COLOURS, EMPTY, NAMES, draw_cells, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

MAX_PICTURES = 8
_LEAST = 2  # less than the pictures of the first level
_COLOURED = (3, 6)  # cells of a picture, least and most


def draw(level: int, rng: random.Random) -> Problem:
    """`level` + 2 or + 3 pictures, each with cells of one colour. The first is not the one that differs."""
    count = level + _LEAST + rng.randint(0, 1)
    common, other = rng.sample(list(COLOURS), 2)
    place = rng.randrange(1, count)
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
    """The colours in order, from the second on with `same` or `other`, then the number; a slip takes any."""
    first, *others = (next(colour for colour in cells if colour != EMPTY) for _, cells in problem.parts)
    steps = [f"1 {first}"]
    steps += [f"{at} {colour} {'same' if colour == first else 'other'}" for at, colour in enumerate(others, start=2)]
    return with_steps(steps, _any(problem, rng) if slip else problem.answer, separator=" ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The number at once; a careless one takes any."""
    return f"Answer: {_any(problem, rng) if careless else problem.answer}"


def _any(problem: Problem, rng: random.Random) -> str:
    return str(rng.randint(2, len(problem.parts)))


def pictures(problem: Problem) -> list[Picture]:
    """All of them, in order."""
    return [draw_cells(*scene) for scene in problem.parts]


DIFFERING = Family("comparison", draw, worked, terse, pictures=pictures)
