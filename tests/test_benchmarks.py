"""What benchmarks that are run in pieces compute from their runs."""

import re

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


def test_a_race_ends_where_a_side_has_most_of_our_gain():
    from rl_trl import compared, fastest, seconds_to, table

    about = {"startup_s": 10.0, "first_step_s": 12.0, "replies_per_s": 100.0}
    runs = {
        "short/ours/0": {"curve": [[0, 0.0, 0.2], [4, 20.0, 0.4], [8, 30.0, 0.7]], **about},
        "short/in_turns/0": {"curve": [[0, 0.0, 0.2], [4, 40.0, 0.5]], **about},
        "short/trl/0": {"curve": [[0, 0.0, 0.2], [2, 40.0, 0.3], [4, 80.0, 0.9]], **about},
        "short/trial/one": {"replies_per_s": 0.0},
        "short/trial/two": {"replies_per_s": 3.0},
    }
    assert seconds_to([[0, 0.0, 0.0], [1, 10.0, 1.0]], 0.25) == (2.5, True)
    line = compared("short", "0", runs)
    assert line is not None
    assert line["target"] == pytest.approx(0.6)
    assert line["ours"] == (pytest.approx(20 + 10 * 2 / 3), True)
    assert line["in_turns"] == (40.0, False)
    assert line["trl"] == (pytest.approx(60.0), True)
    assert fastest("short", runs) == "two"
    shown = table(runs)
    assert "| trl | 10.0 s | 12.0 s | 60.0%: 60.0 s | 90.0% | 100 | 2.25 |" in shown
    assert "> 40.0 s" in shown


def test_faults_of_hosts_are_each_made_once_in_runs_that_can_have_them():
    from random import Random

    from chaos_hosts import FAULTS, FAULTS_A_RUN, LAST, faults_left, roles_of, take_batch

    waiting, batches = faults_left(2 * len(FAULTS), set(), Random(0), runs=[]), []
    assert sorted(waiting) == sorted([*FAULTS, *FAULTS])
    while waiting:
        batches.append(take_batch(waiting))
        assert 0 < len(batches[-1]) <= FAULTS_A_RUN
        assert sum(fault in LAST for fault in batches[-1]) <= 1
    assert sorted(fault for batch in batches for fault in batch) == sorted([*FAULTS, *FAULTS])
    made = [{"kills": [{"fault": fault} for fault in batch]} for batch in batches[:4]]
    left = faults_left(2 * len(FAULTS), set(), Random(0), runs=made)
    assert sorted([*left, *(fault for batch in batches[:4] for fault in batch)]) == sorted([*FAULTS, *FAULTS])
    assert set(faults_left(3, {"judge"}, Random(0), runs=[])) < {fault for fault in FAULTS if "judge" in fault}
    assert roles_of(["judge:off", "engine:cut5"]) == ["judge"]
    assert roles_of(["join", "home:off"]) == []


def test_solutions_of_the_long_race_are_right_and_have_lengths_with_a_tail():
    from random import Random
    from statistics import median

    from rl_trl_puzzles import LONGEST, MEDIAN, SHORTEST, draw, worked

    from posttrain.base.tokenizer import build_tokenizer

    tokenizer, rng, lengths = build_tokenizer(), Random(0), []
    for number in range(400):
        problem = draw(number % 5 + 1, rng)
        text = worked(problem, rng, False)
        start, stride, count = (int(part) for part in re.findall(r"\d+", problem.prompt))
        assert problem.answer == str(sum((start + stride * place) % 100 for place in range(count)) % 10)
        assert len(set(problem.parts)) == count
        assert text.endswith(f" = {problem.answer}. Answer: {problem.answer}")
        assert not worked(problem, rng, True).endswith(f"Answer: {problem.answer}")
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)
    assert min(lengths) < SHORTEST
    assert 0.95 * LONGEST < max(lengths) <= LONGEST
    assert 0.9 * MEDIAN < median(lengths) < 1.1 * MEDIAN
