"""A tokenized conversation, as the stage's process hands it to the ranks. That process does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

PICTURES = "pictures"  # the column of a trainer's dataset with the keys of the pictures of a row, in order


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation; `mask` is 1 on the tokens that are trained on.

    pictures: keys of the pictures that its tokens stand for, in order; they are in the stage's store of pictures.

    Example: a prompt of two tokens and a reply of one: `Example((1, 7, 9), (0, 0, 1))`.
    """

    ids: Sequence[int]
    mask: Sequence[int]
    pictures: Sequence[str] = ()
