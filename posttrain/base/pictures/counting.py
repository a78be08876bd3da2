"""How many cells have a colour. The work is to name the colour of each cell, and to number those that count."""

import random

from posttrain.base.pictures.drawing import EMPTY, NAMES, draw_cells, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_COLOURS = ("red", "green", "blue")
_MOST_OTHERS = 3


def draw(level: int, rng: random.Random) -> Problem:
    """One to `level` + 1 cells of the colour, and one to three of others."""
    wanted = rng.choice(_COLOURS)
    others = [colour for colour in _COLOURS if colour != wanted]
    count, rest = rng.randint(1, level + 1), rng.randint(1, _MOST_OTHERS)
    colours = [wanted] * count + [rng.choice(others) for _ in range(rest)]
    colours += [EMPTY] * (len(NAMES) - count - rest)
    rng.shuffle(colours)
    parts = (random_ground(rng), tuple(colours))
    prompt = f"Count {wanted}"
    return Problem("count", level, prompt, str(count), scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Each cell with its colour, and a number behind those that count; a slip sees one cell wrongly."""
    wanted, colours = problem.prompt.split()[1], list(problem.parts[1])
    if slip:
        cell = rng.randrange(len(colours))
        colours[cell] = EMPTY if colours[cell] == wanted else wanted
    steps, count = [], 0
    for name, colour in zip(NAMES, colours, strict=True):
        count += colour == wanted
        steps.append(f"{name} {colour} {count}" if colour == wanted else f"{name} {colour}")
    return with_steps(steps, str(count), separator=" ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The number at once; a careless one is off by one."""
    count = int(problem.answer)
    return f"Answer: {count + (rng.choice((-1, 1) if count > 1 else (1,)) if careless else 0)}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_cells(*problem.parts)]


COUNTING = Family("counting", draw, worked, terse, pictures=pictures)
