"""pass@k and 95% intervals against enumeration, published figures and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.metrics.intervals import bootstrap_ci95, wilson_ci95
from posttrain.metrics.pass_at_k import pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_naive_power_is_not() -> None:
    p, n, k = 0.3, 6, 4
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance)) == pytest.approx(truth, abs=1e-12)
    naive = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert abs(naive - truth) > 0.01


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_figures(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    assert wilson_ci95(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_symmetric(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson_ci95(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    mirrored = wilson_ci95(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_ci95(generator.beta(2, 5, size=60).tolist(), seed=trial)
        hits += low <= 2 / 7 <= high
    assert 180 <= hits <= 199


def test_bootstrap_is_seeded_and_never_claims_certainty() -> None:
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    assert bootstrap_ci95(values, seed=1) == bootstrap_ci95(values, seed=1)
    assert bootstrap_ci95([1.0] * 12) == wilson_ci95(12, 12)
    low, high = bootstrap_ci95([0.5] * 3)
    assert low < 0.5 < high


@pytest.mark.parametrize("values", [[], [0.2, float("nan")], [1.5]])
def test_bootstrap_refuses_what_is_no_rate(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_ci95(values)
