"""Selects the rows to keep: the hardest ones, exactly the configured fraction, with a fair share of every
capability.
"""

import math
from collections import Counter
from collections.abc import Sequence

from posttrain.data.strata import hash_order, proportional_shares
from posttrain.records import Row


def num_kept(num_rows: int, keep_fraction: float) -> int:
    """The number of rows to keep: round(keep_fraction * num_rows)."""
    return round(keep_fraction * num_rows)


def select(
    rows: Sequence[Row], scores: Sequence[float], keep_fraction: float, *, stratify: bool = True, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Split rows into (kept, dropped), both in the order of `rows`.

    scores: hardness of each row, higher is harder. keep_fraction: in (0, 1]; exactly round(keep_fraction * N) of N
    rows are kept. stratify: each capability keeps its proportional share, to within one row (see
    `proportional_shares`), and within a capability no dropped row is harder than a kept one. Without `stratify`, no
    dropped row at all is harder than a kept one. A seeded hash of the row's id decides between equal scores, so the
    order of the file does not matter. Raises ValueError for a score that is not finite.
    """
    if len(scores) != len(rows) or not all(math.isfinite(score) for score in scores):
        raise ValueError(f"{len(rows)} rows need as many finite scores; got {len(scores)}")
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; must be above 0 and at most 1")
    strata = [row.capability if stratify else "" for row in rows]
    places = proportional_shares(Counter(strata), num_kept(len(rows), keep_fraction), seed)
    chosen: set[int] = set()
    for at in sorted(range(len(rows)), key=lambda at: (-scores[at], hash_order(seed, rows[at].id), rows[at].id)):
        if places[strata[at]]:
            places[strata[at]] -= 1
            chosen.add(at)
    kept = [row for at, row in enumerate(rows) if at in chosen]
    return kept, [row for at, row in enumerate(rows) if at not in chosen]
