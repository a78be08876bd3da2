"""Draws pictures of three by three cells. A cell is named by its column and its row: a1 is the upper left one.

A picture is uint8 [SIDE, SIDE, 3]. The processor of the model makes one tile of it, and each cell becomes one feature.
"""

import hashlib
import io
import random
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.base.problem import Picture

CELL = 14  # pixels along an edge
CELLS = 3  # of a row, and of a column
SIDE = CELL * CELLS
NAMES = tuple(f"{column}{row}" for row in range(1, CELLS + 1) for column in "abc")  # in the order of reading
COLOURS = {"red": (225, 45, 40), "green": (40, 190, 60), "blue": (60, 80, 230), "yellow": (235, 215, 40)}
SHAPES = ("square", "disc")
MAX_HEIGHT = 6  # of a bar, in steps
_STEP = SIDE // MAX_HEIGHT
_FONT = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001010010", "111101111101111", "111101111001111",
)  # fmt: skip
_SCALE = 4  # pixels of a point of the font


class Shape(NamedTuple):
    """cell: its place in `NAMES`. right, down: how far its middle is from that of the cell. radius: in pixels."""

    cell: int
    kind: str
    colour: str
    right: int
    down: int
    radius: int


def random_shape(cell: int, kind: str, colour: str, *, rng: random.Random) -> Shape:
    """A shape whose size and place within the cell are drawn."""
    return Shape(cell, kind, colour, rng.randint(-1, 1), rng.randint(-1, 1), rng.randint(3, 5))


def random_ground(rng: random.Random) -> int:
    """The grey value of a ground: dark or light."""
    return rng.choice((rng.randint(0, 40), rng.randint(205, 250)))


def scene_key(prompt: str, parts: tuple[Any, ...]) -> str:
    """The canonical key of a question about what is drawn: another place, size or ground is another picture."""
    return f"{prompt}, picture {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def draw_shapes(ground: int, shapes: tuple[Shape, ...]) -> Picture:
    """Squares and discs on a plain ground."""
    picture = _blank(ground)
    for cell, kind, colour, right, down, radius in shapes:
        inside = _inside(kind, radius)
        top = CELL * (cell // CELLS) + CELL // 2 + down - radius
        left = CELL * (cell % CELLS) + CELL // 2 + right - radius
        picture[top : top + len(inside), left : left + len(inside)][inside] = COLOURS[colour]
    return picture


@cache
def _inside(kind: str, radius: int) -> NDArray[np.bool_]:
    """The pixels of a shape, within the square around it."""
    along, across = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return along**2 + across**2 <= radius**2 if kind == "disc" else np.full(along.shape, True)


def draw_bars(ground: int, bars: tuple[tuple[str, int], ...]) -> Picture:
    """One bar in each column of cells: its colour, and its height from 1 to `MAX_HEIGHT`."""
    picture = _blank(ground)
    for column, (colour, height) in enumerate(bars):
        left = CELL * column + 3
        picture[SIDE - _STEP * height :, left : left + CELL - 6] = COLOURS[colour]
    return picture


def draw_digits(ground: int, colour: str, digits: tuple[int, ...], *, tops: tuple[int, ...]) -> Picture:
    """One digit in each column of cells. tops: the pixels above each of them."""
    picture = _blank(ground)
    for column, (digit, top) in enumerate(zip(digits, tops, strict=True)):
        points = np.array([bit == "1" for bit in _FONT[digit]]).reshape(5, 3)
        left = CELL * column + 1
        area = picture[top : top + 5 * _SCALE, left : left + 3 * _SCALE]
        area[points.repeat(_SCALE, 0).repeat(_SCALE, 1)] = COLOURS[colour]
    return picture


def as_png(picture: Picture) -> bytes:
    """The bytes of a file with the picture."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, format="PNG")
        return file.getvalue()


def _blank(ground: int) -> Picture:
    return np.full((SIDE, SIDE, 3), ground, np.uint8)
