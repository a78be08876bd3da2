"""Which of three to eight pictures shows a shape of another colour. The work is to say the colour of each."""

import random

from posttrain.base.pictures.drawing import (
    COLOURS,
    NAMES,
    SHAPES,
    draw_shapes,
    random_ground,
    random_shape,
    scene_key,
)
from posttrain.base.problem import Family, Picture, Problem, with_steps

MAX_PICTURES = 8
_LEAST = 2  # less than the pictures of the first level


def draw(level: int, rng: random.Random) -> Problem:
    """`level` + 2 or + 3 pictures with one shape each."""
    count = level + _LEAST + rng.randint(0, 1)
    common, other = rng.sample(list(COLOURS), 2)
    place = rng.randrange(count)
    scenes = tuple(
        (
            random_ground(rng),
            (random_shape(rng.randrange(len(NAMES)), rng.choice(SHAPES), other if at == place else common, rng=rng),),
        )
        for at in range(count)
    )
    prompt = "Which differs"
    return Problem("differ", level, prompt, str(place + 1), scene_key(prompt, scenes), scenes, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """The colours in order, then the number of the picture; a slip takes another one."""
    colours = [shapes[0].colour for _, shapes in problem.parts]
    return with_steps(colours, str(rng.randint(1, len(colours))) if slip else problem.answer)


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The number at once; a careless one takes any."""
    return f"Answer: {rng.randint(1, len(problem.parts)) if careless else problem.answer}"


def pictures(problem: Problem) -> list[Picture]:
    """All of them, in order."""
    return [draw_shapes(*scene) for scene in problem.parts]


DIFFERING = Family("comparison", draw, worked, terse, pictures=pictures)
