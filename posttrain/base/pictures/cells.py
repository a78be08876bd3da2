"""The cell of the only shape of a kind and colour. The work is to go through all shapes of the colour."""

import random

from posttrain.base.pictures.drawing import NAMES, SHAPES, draw_shapes, random_ground, random_shape, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_COLOURS = ("red", "green", "blue")


def draw(level: int, rng: random.Random) -> Problem:
    """The shape, up to four others of its colour, and one to three of its kind in other colours."""
    colour, kind = rng.choice(_COLOURS), rng.choice(SHAPES)
    other_kind = SHAPES[1 - SHAPES.index(kind)]
    other_colours = [other for other in _COLOURS if other != colour]
    same = rng.randint(max(0, level - 2), level - 1)
    looks = [(kind, colour), *[(other_kind, colour)] * same]
    looks += [(kind, rng.choice(other_colours)) for _ in range(rng.randint(1, 3))]
    cells = rng.sample(range(len(NAMES)), len(looks))
    shapes = tuple(random_shape(cell, *look, rng=rng) for cell, look in zip(cells, looks, strict=True))
    parts = (random_ground(rng), shapes, tuple(sorted((shape.cell, shape.kind) for shape in shapes[: same + 1])))
    prompt = f"Find {colour} {kind}"
    return Problem("find", level, prompt, NAMES[cells[0]], scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Name each shape of the colour, then the cell that was asked for; a slip takes another cell."""
    steps = [f"{NAMES[cell]} {kind}" for cell, kind in problem.parts[2]]
    return with_steps(steps, rng.choice(NAMES) if slip else problem.answer)


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The cell at once; a careless one takes any shape of the colour or of the kind."""
    return f"Answer: {NAMES[rng.choice(problem.parts[1]).cell] if careless else problem.answer}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_shapes(*problem.parts[:2])]


CELLS = Family("grounding", draw, worked, terse, pictures=pictures)
