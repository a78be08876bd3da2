"""The curriculum: beliefs against the Beta distribution's own figures, bands, and what is drawn."""

import json
import random
from collections import Counter

import pytest

from posttrain.config.base import validate_config
from posttrain.config.shared import SystemsConfig
from posttrain.records import Message, Row
from posttrain.rl.config import CurriculumConfig
from posttrain.rl.curriculum import Curriculum
from posttrain.rl.profile import Difficulty
from posttrain.rl.prompts import PromptSource


def curriculum_of(passes: dict[str, int], steps: int = 10, **changes) -> Curriculum:
    """Prompts with so many of 8 passed."""
    config = validate_config(CurriculumConfig, changes, "test")
    return Curriculum(config, [Difficulty(name, "math", 8, count, 0, True) for name, count in passes.items()], steps)


def source_of(curriculum: Curriculum, names, tries: int = 32, seed: int = 0) -> PromptSource:
    rows = [Row(name, "math", (Message("user", name),)) for name in names]
    systems = validate_config(SystemsConfig, {}, "test")
    return PromptSource(rows, systems, lambda messages: [1], seed, curriculum, tries)


def test_a_belief_is_the_beta_of_its_counts_and_fades_by_half():
    curriculum = curriculum_of({"p": 6}, half_life=10)
    assert curriculum.belief("p").mean == pytest.approx(7 / 10)  # Beta(7, 3)
    curriculum.observe("p", passes=1, failures=3)
    assert curriculum.belief("p").mean == pytest.approx(8 / 14)  # Beta(8, 6)
    curriculum.advance(10, 0.5)
    belief = curriculum.belief("p")
    assert (belief.passes, belief.failures) == (3.5, 2.5)
    assert curriculum.belief("unknown").mean == 0.5


def test_prompts_are_taken_as_often_as_their_belief_lies_in_the_band():
    """P(0.25 <= rate <= 0.75) of Beta(1, 1) is 1/2; of Beta(9, 1), whose distribution is x^9, it is 0.0751."""
    curriculum = curriculum_of({"solved": 8}, schedule="constant", first=[0.25, 0.75])
    rng = random.Random(0)
    for name, share in (("unknown", 0.5), ("solved", 0.75**9 - 0.25**9)):
        taken = sum(curriculum.miss(name, rng) == 0 for _ in range(20_000)) / 20_000
        assert taken == pytest.approx(share, abs=0.012), name


def test_the_band_moves_with_the_steps():
    curriculum = curriculum_of({}, steps=10, first=[0.4, 0.9], last=[0.0, 0.5])
    assert curriculum.band == pytest.approx((0.4, 0.9))
    curriculum.advance(5, 0.0)
    assert curriculum.band == pytest.approx((0.2, 0.7))
    curriculum.advance(10, 0.0)
    assert curriculum.band == pytest.approx((0.0, 0.5))


def test_the_adaptive_band_follows_the_pass_rate():
    curriculum = curriculum_of({}, steps=40, schedule="adaptive", first=[0.4, 0.8], last=[0.0, 0.4])
    for version in range(10):
        curriculum.advance(version, 0.9)
    harder = curriculum.band
    assert harder[0] < 0.4 - 0.1
    for version in range(10, 14):
        curriculum.advance(version, 0.1)
    assert curriculum.band > harder
    for version in range(14, 200):
        curriculum.advance(version, 0.0)
    assert curriculum.band == pytest.approx((0.4, 0.8))  # never easier than `first`


def test_solved_and_impossible_prompts_are_hardly_drawn_and_tried_again_later():
    passes = {**{f"solved{i}": 8 for i in range(10)}, **{f"half{i}": 4 for i in range(10)}}
    passes |= {f"never{i}": 0 for i in range(10)}
    curriculum = curriculum_of(passes, schedule="constant", first=[0.3, 0.7], half_life=5)
    source = source_of(curriculum, passes)
    early = Counter(source.draw("math").row.id.rstrip("0123456789") for _ in range(300))
    assert early["half"] > 240
    assert curriculum.figures()["prompts_solved"] == curriculum.figures()["prompts_impossible"] == 0  # 8 are not enough
    for name in passes:
        curriculum.observe(name, *{"s": (12, 0), "h": (6, 6), "n": (0, 12)}[name[0]])
    assert curriculum.figures()["prompts_solved"] == curriculum.figures()["prompts_impossible"] == 10
    curriculum.advance(40, 0.5)  # eight half-lives: nothing is known any more
    late = Counter(source.draw("math").row.id.rstrip("0123456789") for _ in range(300))
    assert late["solved"] > 60
    assert late["never"] > 60


def test_where_nothing_is_in_the_band_the_nearest_is_drawn():
    curriculum = curriculum_of({"easy": 8, "hard": 0}, schedule="constant", first=[0.999, 1.0])
    source = source_of(curriculum, ["easy", "hard"])
    drawn = Counter(source.draw("math").row.id for _ in range(100))
    assert drawn["easy"] > 90


def test_draws_go_on_after_a_checkpoint():
    names = [f"p{i}" for i in range(20)]
    passes = {name: index % 9 for index, name in enumerate(names)}
    one, two = (source_of(curriculum_of(passes, schedule="adaptive"), names, seed=seed) for seed in (1, 2))
    for version in range(5):
        one.observe(one.draw("math").row.id, 3, 1)
        one.advance(version, 0.7)
    two.restore(json.loads(json.dumps(one.state())))
    assert [one.draw("math") for _ in range(40)] == [two.draw("math") for _ in range(40)]
    assert one.advance(6, 0.5) == two.advance(6, 0.5)
