"""The selection of prompts: beliefs against the Beta distribution's own figures, what is drawn, and what it saves."""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from posttrain.errors import ConfigError
from posttrain.records import Message, Row
from posttrain.rl.prompts.beliefs import Beliefs, mixed_chance
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.measured import pool_pass_at_k
from posttrain.rl.prompts.prior import UNIFORM, fit_prior
from posttrain.rl.prompts.selection import Selection


def rows_of(count: int, capability: str = "math", **fields: object) -> list[Row]:
    return [Row(f"{capability}{i}", capability, (Message("user", "?"),), None, fields) for i in range(count)]


def selection_of(rows: Sequence[Row], seed: int = 0, **options: object) -> Selection:
    return Selection(Beliefs(rows, 20.0, **options), group_size=8, seed=seed)


def draw(selection: Selection, count: int, first: int = 1, capability: str = "math") -> list[str]:
    places = [selection.draw(capability, number, number) for number in range(first, first + count)]
    return [selection.beliefs.id_of(place) for place in places]


def test_a_belief_is_the_beta_of_its_counts_and_fades_by_half():
    beliefs = Beliefs(rows_of(2), 10.0)
    beliefs.observe("math0", 6, 2, version=0)
    assert np.allclose(beliefs.shapes(np.array([0, 1])), [[7, 1], [3, 1]])  # on the uniform prior
    beliefs.advance(10)
    a, b = beliefs.prior("math0")
    assert np.allclose(beliefs.shapes(np.array([0, 1])), [[a + 3, a], [b + 1, b]])


def test_the_belief_about_one_prompt_is_that_of_an_array():
    beliefs = Beliefs([*rows_of(3), *rows_of(2, "coding")], 10.0)
    for name, passes, failures, version in [("math0", 6, 2, 0), ("coding1", 0, 3, 2), ("math0", 1, 0, 4)]:
        beliefs.advance(version)
        beliefs.observe(name, passes, failures, version=version)
    a, b = beliefs.shapes(np.arange(5))
    assert [beliefs.shape(place) for place in range(5)] == list(zip(a.tolist(), b.tolist(), strict=True))
    assert len({beliefs.shape(place) for place in range(5)}) == 4


def test_the_prior_is_that_which_drew_the_counts():
    rng = random.Random(0)

    def counts(prompts: int, a: float, b: float, n: int) -> Counter[tuple[int, int]]:
        rates = [rng.betavariate(a, b) for _ in range(prompts)]
        return Counter((sum(rng.random() < rate for _ in range(n)), n) for rate in rates)

    for a, b in ((0.25, 0.5), (2.0, 1.0)):
        assert fit_prior(counts(2000, a, b, 8)) == pytest.approx((a, b), rel=0.25)
    assert fit_prior({}) == UNIFORM
    assert fit_prior(counts(1, 0.1, 0.1, 4)) == pytest.approx(UNIFORM, rel=0.6)
    a, b = fit_prior(counts(2000, 0.2, 0.6, 1))  # one reply each tells the mean alone
    assert a / (a + b) == pytest.approx(0.25, abs=0.05)


def test_a_stratum_has_its_own_prior_where_there_is_evidence_and_else_about_that_of_all():
    rows = rows_of(60) + rows_of(60, "coding") + rows_of(1, "chat")
    beliefs = Beliefs(rows, 20.0)
    for place in range(60):
        beliefs.observe(f"math{place}", 8 * (place % 2), 8 - 8 * (place % 2), version=0)  # always or never
        beliefs.observe(f"coding{place}", 4, 4, version=0)
    beliefs.fit()
    assert max(beliefs.prior("math0")) < 0.5 < 2 < min(beliefs.prior("coding0"))
    for low, value, high in zip(*(beliefs.prior(f"{name}0") for name in ("math", "chat", "coding")), strict=True):
        assert low < value < high


def test_the_chance_of_a_mixed_group_by_hand():
    """Of two replies under Beta(1, 1), both pass with chance 1/3; one reply is never mixed."""
    a = np.array([1.0, 1.0, 400.0])
    assert mixed_chance(a, a, 2) == pytest.approx([1 / 3, 1 / 3, 0.5], abs=1e-3)
    assert mixed_chance(a, a, 1) == pytest.approx([0, 0, 0])


def test_prompts_whose_groups_are_mixed_come_first_and_take_turns():
    rows = rows_of(90)
    selection = selection_of(rows)
    for place in range(90):
        passes = (0, 4, 8)[place % 3]
        selection.beliefs.observe(f"math{place}", passes, 8 - passes, version=0)
    selection.advance(0)
    drawn = Counter(draw(selection, 60))
    mixed = {f"math{place}" for place in range(1, 90, 3)}
    assert sum(drawn[name] for name in mixed) >= 50
    assert max(drawn.values()) <= 4  # a quarter of about 30 rests between two draws of one
    assert len(drawn.keys() & mixed) > 20


def test_what_was_trained_on_less_comes_first_among_prompts_as_likely_to_be_mixed():
    """Half of the prompts were sampled four times as often, with the same pass rate; all would give mixed groups."""
    selection = selection_of(rows_of(80))
    for place in range(80):
        groups = 1 + 4 * (place % 2)
        selection.beliefs.observe(f"math{place}", 4 * groups, 4 * groups, version=0)
    selection.advance(0)
    assert selection.beliefs.num_replies(np.array([0, 1])).tolist() == [8, 40]
    drawn = draw(selection, 30)
    assert sum(int(name.removeprefix("math")) % 2 == 0 for name in drawn) >= 25


def test_equal_first_replies_go_on_where_others_would_not_bring_more():
    """With a flat prior the six others mix with chance 1 - 3/9 after two passes: 1/9 for each; else far less."""
    rows = rows_of(3)
    selection = selection_of(rows)
    selection.beliefs.observe("math1", 40, 0, version=0)
    rate = selection._useful_a_reply
    assert rate == 1 / 32
    assert [selection.goes_on(name, 2, 0) for name in ("math0", "math1")] == [True, False]
    assert [selection.may_stop(name, 2) for name in ("math0", "math1")] == [False, True]
    assert selection.goes_on("math1", 0, 2)  # after all
    for _ in range(1000):
        selection.decided(8, is_useful=True)
    assert selection._useful_a_reply == pytest.approx(1 / 8, rel=0.01)
    assert not selection.goes_on("math0", 2, 0)
    assert selection.may_stop("math0", 2)
    for _ in range(1000):
        selection.decided(2, is_useful=False)
    assert selection._useful_a_reply < rate


def test_first_groups_count_the_replies_that_were_sampled_whatever_the_others_were():
    beliefs = Beliefs(rows_of(1), 20.0)
    beliefs.observe("math0", 5, 3, version=2, first=(1, 1))
    (found,) = beliefs.first_groups()
    assert (found.n, found.passes, found.policy_version) == (2, 1, 2)


def test_a_pool_smaller_than_what_is_in_flight_is_drawn_all_the_same():
    assert set(draw(selection_of(rows_of(2)), 20)) == {"math0", "math1"}


def test_a_predictor_tells_of_prompts_that_were_not_seen():
    rows = [row for level in (1, 2) for row in rows_of(50, level=level)]
    rows = [Row(f"p{place}", "math", row.messages, None, row.fields) for place, row in enumerate(rows)]
    selection = selection_of(rows, predictor="level")
    for place in range(20):
        selection.beliefs.observe(f"p{place}", 4, 4, version=0)
        selection.beliefs.observe(f"p{50 + place}", 0, 8, version=0)
    selection.advance(0)
    unseen = [int(name[1:]) for name in draw(selection, 30) if int(name[1:]) % 50 >= 20]
    assert unseen
    assert all(place < 50 for place in unseen)


@pytest.mark.parametrize(("fields", "found"), [({}, "has no field 'level'"), ({"level": [1]}, r"has \[1\] in 'level'")])
def test_a_row_without_the_predictor_is_named(fields: dict, found: str):
    rows = [*rows_of(1, level=1), Row("other", "math", (Message("user", "?"),), None, fields)]
    with pytest.raises(ConfigError, match=f"selection.predictor.*row 'other' {found}.*remove selection.predictor"):
        Beliefs(rows, 20.0, "level")


def test_numbers_with_many_values_are_binned():
    rows = [Row(f"p{place}", "math", (), None, {"level": place / 7}) for place in range(80)]
    priors = Beliefs(rows, 20.0, "level")._strata
    assert len(priors) == 8


def test_draws_go_on_after_a_checkpoint_whatever_the_order_of_scoring():
    rows = rows_of(40) + rows_of(40, "coding")
    one, other = selection_of(rows, 3), selection_of(rows, 3)
    seen = [(name, random.Random(name).randint(0, 8)) for name in draw(one, 30)]
    draw(other, 30)
    for selection, order in ((one, seen), (other, seen[::-1])):
        for name, passes in order:
            selection.beliefs.observe(name, passes, 8 - passes, version=0)
        selection.advance(1)
    resumed = selection_of(rows, 3)
    resumed.restore(json.loads(json.dumps(other.state())))
    for number, (name, _) in enumerate(seen, 1):
        resumed.was_drawn(name, number)
    draws = draw(one, 40, 31)
    assert draws == draw(other, 40, 31) == draw(resumed, 40, 31)
    assert draws != draw(selection_of(rows, 4), 40, 31)
    assert resumed.figures() == one.figures()
    first = {item.prompt_id: (item.passes, item.n, item.policy_version) for item in resumed.beliefs.first_groups()}
    assert first == {name: (passes, 8, 0) for name, passes in seen}


def test_pass_at_k_of_a_pool_weighs_its_strata_by_their_rows():
    """One of 9 easy rows and one of 3 hard ones were drawn; C(3, 2) / C(4, 2) is a half."""
    rows = [Row(f"p{place}", "math", (), None, {"level": "easy" if place < 9 else "hard"}) for place in range(12)]
    found = [Difficulty("p0", "math", 4, 4, 0, True), Difficulty("p9", "math", 4, 1, 0, True)]
    both = {"prompts": 2, "pass@1": pytest.approx(0.75 + 0.25 * 0.25), "pass@2": pytest.approx(0.75 + 0.25 * 0.5)}
    assert pool_pass_at_k(rows, found, [2], predictor="level") == {"math": both}
    assert pool_pass_at_k(rows, found, [2, 8], predictor="level") == {"math": both}
    assert pool_pass_at_k(rows, found, [8], predictor=None) == {}


def test_groups_that_were_sampled_at_once_tell_of_more_replies_than_those_that_began_with_two():
    rows = rows_of(12)
    found = [Difficulty(f"math{place}", "math", 2, 1, 0, True) for place in range(3)]
    found += [Difficulty(f"math{place}", "math", 4, place - 4, 0, True) for place in (4, 6)]
    of_two = (3 + 0 + 5 / 6) / 5  # C(2, 2) / C(4, 2) is a sixth
    assert pool_pass_at_k(rows, found, [2, 4], predictor=None) == {
        "math": {"prompts": 5, "pass@1": 0.4, "pass@2": pytest.approx(of_two), "pass@4": 0.5}
    }


def test_the_selection_costs_fewer_rollouts_than_drawing_all_alike(monkeypatch: pytest.MonkeyPatch):
    """Simulated. Pools of which a tenth is medium: 2.2 to 3 times fewer over seeds 0 to 9."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    from rl_selection import Course, rollouts_per_useful

    course = Course(prompts=500, medium=0.1, steps=20, batch=8)
    costs = {arm: rollouts_per_useful(arm, course, 0) for arm in ("uniform", "selection", "oracle")}
    assert None not in costs.values()
    assert costs["oracle"] < costs["selection"] < costs["uniform"] / 1.5
