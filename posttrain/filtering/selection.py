"""Selects the rows to keep: the hardest ones, exactly the configured fraction, with a fair share of every
capability.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.arrays import where, zeros
from posttrain.data.ranked import Ranked
from posttrain.data.stored import pick
from posttrain.data.strata import hash_order, proportional_shares, stratum_of
from posttrain.records import Row

if TYPE_CHECKING:
    from posttrain.data.arrays import Array


def num_kept(num_rows: int, keep_fraction: float) -> int:
    """The number of rows to keep: round(keep_fraction * num_rows)."""
    return round(keep_fraction * num_rows)


def select(
    rows: Sequence[Row], scores: Sequence[float], keep_fraction: float, *, stratify: bool = True, seed: int = 0
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split rows into (kept, dropped), both in the order of `rows`. Arguments and errors are those of `places_kept`."""
    kept, dropped = places_kept(rows, scores, keep_fraction, stratify=stratify, seed=seed)
    return pick(rows, kept), pick(rows, dropped)


def places_kept(
    rows: Sequence[Row], scores: Sequence[float], keep_fraction: float, *, stratify: bool = True, seed: int = 0
) -> "tuple[Array, Array]":
    """The places of the rows that are kept, and of those that are dropped, both in order.

    scores: hardness of each row, higher is harder. keep_fraction: in (0, 1]; exactly round(keep_fraction * N) of N
    rows are kept. stratify: each stratum (`stratum_of`) keeps its proportional share, to within one row (see
    `proportional_shares`), and within a stratum no dropped row is harder than a kept one. Without `stratify`, no
    dropped row at all is harder than a kept one. A seeded hash of the row's id decides between equal scores, so the
    order of the file does not matter. Raises ValueError for a score that is not finite.
    """
    if len(scores) != len(rows):
        raise ValueError(f"{len(rows)} rows need as many finite scores; got {len(scores)}")
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; must be above 0 and at most 1")
    is_kept = zeros(len(rows), np.bool_)
    with Ranked(_hardest_first(rows, scores, stratify=stratify, seed=seed)) as ranked:
        for place in ranked.first(proportional_shares(ranked.sizes, num_kept(len(rows), keep_fraction), seed)):
            is_kept[place] = True
    every = range(len(rows))
    return where(every, lambda places: is_kept[places]), where(every, lambda places: ~is_kept[places])


def _hardest_first(
    rows: Sequence[Row], scores: Sequence[float], *, stratify: bool, seed: int
) -> Iterator[tuple[str, float, int]]:
    for row, score in zip(rows, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"row {row.id!r} has the score {score}; all rows need finite scores")
        yield stratum_of(row) if stratify else "", -score, hash_order(seed, row.id)
