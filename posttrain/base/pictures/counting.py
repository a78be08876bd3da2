"""How many shapes have a colour. The work is to name the cells where they are."""

import random

from posttrain.base.pictures.drawing import NAMES, SHAPES, draw_shapes, random_ground, random_shape, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_COLOURS = ("red", "green", "blue")


def draw(level: int, rng: random.Random) -> Problem:
    """One to `level` + 1 shapes of the colour, and one to three of others."""
    wanted = rng.choice(_COLOURS)
    others = [colour for colour in _COLOURS if colour != wanted]
    count, rest = rng.randint(1, level + 1), rng.randint(1, 3)
    cells = rng.sample(range(len(NAMES)), count + rest)
    colours = [wanted] * count + [rng.choice(others) for _ in range(rest)]
    shapes = tuple(
        random_shape(cell, rng.choice(SHAPES), colour, rng=rng) for cell, colour in zip(cells, colours, strict=True)
    )
    parts = (random_ground(rng), shapes, tuple(sorted(cells[:count])))
    prompt = f"Count {wanted}"
    return Problem("count", level, prompt, str(count), scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Name the cells, then count; a slip leaves one out, or names one too many."""
    cells = list(problem.parts[2])
    if slip:
        free = [cell for cell in range(len(NAMES)) if cell not in cells]
        cells = sorted([*cells, rng.choice(free)]) if len(cells) == 1 or rng.random() < 0.5 else cells[1:]
    return with_steps([NAMES[cell] for cell in cells], str(len(cells)))


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The number at once; a careless one is off by one."""
    count = int(problem.answer)
    return f"Answer: {count + (rng.choice((-1, 1) if count > 1 else (1,)) if careless else 0)}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_shapes(*problem.parts[:2])]


COUNTING = Family("counting", draw, worked, terse, pictures=pictures)
