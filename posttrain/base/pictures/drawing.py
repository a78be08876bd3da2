"""Draws pictures of three by three cells. A cell is named by its column and its row: a1 is the upper left one.

A picture is uint8 [SIDE, SIDE, 3]. The processor of the model makes one tile of it, and each cell becomes one feature.
Whatever is drawn fills cells, and grounds are grey, which the processor makes about 0. With smaller shapes on dark and
light grounds a base of this size did not tell colours apart for as long as it was watched.
"""

import hashlib
import io
import random
from typing import Any

import numpy as np

from posttrain.base.problem import Picture

CELL = 14  # pixels along an edge
CELLS = 3  # of a row, and of a column
SIDE = CELL * CELLS
NAMES = tuple(f"{column}{row}" for row in range(1, CELLS + 1) for column in "abc")  # in the order of reading
COLOURS = {"red": (225, 45, 40), "green": (40, 190, 60), "blue": (60, 80, 230), "yellow": (235, 215, 40)}
_GROUNDS = (108, 148)
EMPTY = "none"  # in place of a colour
MAX_HEIGHT = 6  # of a bar, in steps
_STEP = SIDE // MAX_HEIGHT
_FONT = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001010010", "111101111101111", "111101111001111",
)  # fmt: skip
_POINT = (2, 4)  # height and width of a point of the font, in pixels


def random_ground(rng: random.Random) -> int:
    """The grey value of a ground. All are near the middle, which the processor makes 0."""
    return rng.randint(*_GROUNDS)


def scene_key(prompt: str, parts: tuple[Any, ...]) -> str:
    """The canonical key of a question about what is drawn: another place, size or ground is another picture."""
    return f"{prompt}, picture {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def draw_cells(ground: int, colours: tuple[str, ...]) -> Picture:
    """The cells in their colours, in the order of `NAMES`; an empty one stays ground."""
    picture = _blank(ground)
    for cell, colour in enumerate(colours):
        if colour != EMPTY:
            top, left = CELL * (cell // CELLS), CELL * (cell % CELLS)
            picture[top : top + CELL, left : left + CELL] = COLOURS[colour]
    return picture


def draw_bars(ground: int, bars: tuple[tuple[str, int], ...]) -> Picture:
    """One bar in each column of cells: its colour, and its height from 1 to `MAX_HEIGHT`."""
    picture = _blank(ground)
    for column, (colour, height) in enumerate(bars):
        picture[SIDE - _STEP * height :, CELL * column : CELL * (column + 1)] = COLOURS[colour]
    return picture


def draw_digits(ground: int, digits: tuple[int, ...]) -> Picture:
    """One black digit in each cell of the middle row, from the left."""
    picture = _blank(ground)
    for column, digit in enumerate(digits):
        points = np.array([bit == "1" for bit in _FONT[digit]]).reshape(5, 3)
        top, left = CELL + 2, CELL * column + 1
        area = picture[top : top + 5 * _POINT[0], left : left + 3 * _POINT[1]]
        area[points.repeat(_POINT[0], 0).repeat(_POINT[1], 1)] = 0
    return picture


def as_png(picture: Picture) -> bytes:
    """The bytes of a file with the picture."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, format="PNG")
        return file.getvalue()


def _blank(ground: int) -> Picture:
    return np.full((SIDE, SIDE, 3), ground, np.uint8)
