"""The colour of the highest or the lowest of three bars. The work is to read each height."""

import random

from posttrain.base.pictures.drawing import COLOURS, MAX_HEIGHT, draw_bars, random_ground, scene_key
from posttrain.base.problem import Family, Picture, Problem, with_steps

_BARS = 3
# The least difference between the bar that is asked for and the next.
_GAP = {1: 3, 2: 2, 3: 2, 4: 1, 5: 1}


def draw(level: int, rng: random.Random) -> Problem:
    """Three bars of different heights and colours."""
    highest = rng.random() < 0.5
    while True:
        heights = rng.sample(range(1, MAX_HEIGHT + 1), _BARS)
        ordered = sorted(heights, reverse=highest)
        gap = abs(ordered[0] - ordered[1])
        if gap >= _GAP[level] if level < 4 else gap == _GAP[level]:
            break
    bars = tuple(zip(rng.sample(list(COLOURS), _BARS), heights, strict=True))
    parts = (random_ground(rng), bars)
    prompt = f"{'Highest' if highest else 'Lowest'} bar"
    answer = bars[heights.index(ordered[0])][0]
    return Problem("bars", level, prompt, answer, scene_key(prompt, parts), parts, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Each bar with its height, then the answer; a slip reads one height wrongly."""
    heights = [height for _, height in problem.parts[1]]
    names = [colour for colour, _ in problem.parts[1]]
    if slip:
        heights[rng.randrange(_BARS)] = rng.randint(1, MAX_HEIGHT)
    choose = max if problem.prompt.startswith("Highest") else min
    steps = [f"{at} {name} {height}" for at, name, height in zip("abc", names, heights, strict=True)]
    return with_steps(steps, names[heights.index(choose(heights))], separator=" ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The colour at once; a careless one takes any bar."""
    return f"Answer: {rng.choice(problem.parts[1])[0] if careless else problem.answer}"


def pictures(problem: Problem) -> list[Picture]:
    """The one picture."""
    return [draw_bars(*problem.parts)]


BARS = Family("charts", draw, worked, terse, pictures=pictures)
