"""A tokenized conversation, as the stage's process hands it to the ranks. That process does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation; `mask` is 1 on the tokens that are trained on.

    Example: a prompt of two tokens and a reply of one: `Example((1, 7, 9), (0, 0, 1))`.
    """

    ids: Sequence[int]
    mask: Sequence[int]
