"""Compares two policies on the same rows: how many rows only one of them gets right, and the difference of means.

Because both were measured on the same rows, these tests find differences that two separate intervals do not show.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.metrics.intervals import bootstrap_ci95


def mcnemar_p(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely such an uneven split is if both are equally good.

    only_a, only_b: numbers of rows that only A, or only B, gets right. If both are equally good, each such row is a
    toss of a fair coin. Without such rows p is 1. Raises ValueError for a negative count.
    Source: McNemar 1947, Psychometrika 12(2), in its exact, binomial form.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"mcnemar_p({only_a}, {only_b}): needs counts of 0 or more")
    n, fewer = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1  # exact integers: C(n, 0), and the sum of C(n, i) for i up to `fewer`
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of B minus that of A over the same rows, with its 95% interval."""

    mean: float
    low: float
    high: float


def mean_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """The difference of two means over the same rows, with a 95% interval from a bootstrap over rows.

    a, b: the values of the two policies, in the order of the rows. If all rows differ by the same amount, the bootstrap
    shows no spread. The interval is then Wilson's, which is wide enough for any values in the range of those given (at
    least 0 to 1). Raises ValueError if there are no rows, or if the two lengths differ.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"mean_difference of {len(a)} and {len(b)} values: needs equally many, at least one")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    span = max(1.0, max(*a, *b) - min(*a, *b))
    # The bootstrap takes values in [0, 1]. A percentile interval moves and scales along with its values.
    low, high = bootstrap_ci95([(difference / span + 1) / 2 for difference in differences], seed)
    return Difference(sum(differences) / len(a), span * (2 * low - 1), span * (2 * high - 1))
