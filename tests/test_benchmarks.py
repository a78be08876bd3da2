"""What benchmarks that are run in pieces compute from their runs."""

import pytest


def test_the_target_is_one_that_all_runs_reach_and_costs_are_interpolated():
    from rl_curriculum import target, to_target

    runs = [{"accuracy": [0.2, 0.4, 0.3, 0.6]}, {"accuracy": [0.2, 0.5, 0.5, 0.45]}]
    goal = target(runs)
    assert goal == pytest.approx(0.2 + 0.8 * (1.45 / 3 - 0.2))  # the second ends at the mean of its last three
    tokens, at, is_reached = to_target([0, 100, 200, 300], runs[0]["accuracy"], goal)
    assert is_reached
    assert (tokens, at) == (pytest.approx(200 + 100 * (goal - 0.35) / 0.25), pytest.approx(2 + (goal - 0.35) / 0.25))


def test_of_a_difference_between_arms_the_interval_is_students():
    from recipe_table import differences, interval

    runs = {f"{arm}/{seed}": {"accuracy": value} for arm, seed, value in (
        ("a", 0, 0.8), ("a", 1, 0.9), ("b", 0, 0.7), ("b", 1, 0.7), ("b", 2, 0.1))}  # fmt: skip
    assert differences("a", "b", runs) == pytest.approx([10, 20])
    assert interval([10, 20]) == pytest.approx((15 - 12.706 * 5, 15 + 12.706 * 5), rel=1e-4)
    assert interval([10]) is None
