"""Selects the rows to keep: the hardest ones, exactly the configured fraction, with a fair share of every
capability.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.stored import pick
from posttrain.data.strata import hash_order, proportional_shares
from posttrain.records import Row


def num_kept(num_rows: int, keep_fraction: float) -> int:
    """The number of rows to keep: round(keep_fraction * num_rows)."""
    return round(keep_fraction * num_rows)


def select(
    rows: Sequence[Row], scores: Sequence[float], keep_fraction: float, *, stratify: bool = True, seed: int = 0
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split rows into (kept, dropped), both in the order of `rows`. Arguments and errors are those of `places_kept`."""
    kept = places_kept(rows, scores, keep_fraction, stratify=stratify, seed=seed)
    return pick(rows, np.flatnonzero(kept)), pick(rows, np.flatnonzero(~kept))


def places_kept(
    rows: Sequence[Row], scores: Sequence[float], keep_fraction: float, *, stratify: bool = True, seed: int = 0
) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """For each row, whether it is kept.

    scores: hardness of each row, higher is harder. keep_fraction: in (0, 1]; exactly round(keep_fraction * N) of N
    rows are kept. stratify: each capability keeps its proportional share, to within one row (see
    `proportional_shares`), and within a capability no dropped row is harder than a kept one. Without `stratify`, no
    dropped row at all is harder than a kept one. A seeded hash of the row's id decides between equal scores, so the
    order of the file does not matter. Raises ValueError for a score that is not finite.
    """
    if len(scores) != len(rows) or not np.isfinite(scores).all():
        raise ValueError(f"{len(rows)} rows need as many finite scores; got {len(scores)}")
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; must be above 0 and at most 1")
    names: dict[str, int] = {}  # stratum -> its number
    hashes, strata = np.empty(len(rows), np.uint64), np.empty(len(rows), np.int64)
    for place, row in enumerate(rows):
        hashes[place] = hash_order(seed, row.id)
        strata[place] = names.setdefault(row.capability if stratify else "", len(names))
    sizes = dict(zip(names, np.bincount(strata, minlength=len(names)).tolist(), strict=True))
    shares = proportional_shares(sizes, num_kept(len(rows), keep_fraction), seed)
    kept = np.zeros(len(rows), bool)
    order = np.lexsort((hashes, -np.asarray(scores)))  # the hardest first
    for name, number in names.items():
        kept[order[strata[order] == number][: shares[name]]] = True
    return kept
