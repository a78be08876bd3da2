"""The curriculum: beliefs against the Beta distribution's own figures, bands, and what is drawn."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.base import validate_config
from posttrain.config.rewards import SystemsConfig
from posttrain.errors import ConfigError, PluginError
from posttrain.records import Message, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.prompts.config import CurriculumConfig, RefilterConfig
from posttrain.rl.prompts.curriculum import Curriculum
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.prior import UNIFORM, fit_prior
from posttrain.rl.prompts.refilter import Refilter
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.stage import prompt_source


def curriculum_of(passes: dict[str, int], steps: int = 10, **changes) -> Curriculum:
    """Prompts with so many of 8 passed."""
    config = validate_config(CurriculumConfig, changes, "test")
    return Curriculum(config, [Difficulty(name, "math", 8, count, 0, True) for name, count in passes.items()], steps)


def source_of(curriculum: Curriculum, names, tries: int = 32, seed: int = 0) -> PromptSource:
    rows = [Row(name, "math", (Message("user", name),)) for name in names]
    systems = validate_config(SystemsConfig, {}, "test")
    return PromptSource(rows, systems, lambda row, messages: [1], seed=seed, curriculum=curriculum, tries=tries)


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


def test_the_prior_is_that_of_the_whole_profile():
    """Fits what drew the counts; few prompts, or one reply each, leave it near the uniform one."""
    rng = random.Random(0)

    def profile(prompts: int, a: float, b: float, n: int) -> list[Difficulty]:
        rates = [rng.betavariate(a, b) for _ in range(prompts)]
        passes = [sum(rng.random() < rate for _ in range(n)) for rate in rates]
        return [Difficulty(f"p{index}", "math", n, count, 0, True) for index, count in enumerate(passes)]

    for a, b in ((0.2, 0.3), (1.0, 1.0), (3.0, 1.5)):
        assert fit_prior(profile(2000, a, b, 8)) == pytest.approx((a, b), rel=0.25)
    assert fit_prior([]) == fit_prior([Difficulty("p", "math", 0, 0, 0, False)]) == UNIFORM
    assert fit_prior(profile(1, 0.1, 0.1, 4)) == pytest.approx(UNIFORM, rel=0.6)
    a, b = fit_prior(profile(2000, 0.2, 0.2, 1))
    assert a / (a + b) == pytest.approx(0.5, abs=0.05)
    assert a + b == pytest.approx(2, rel=0.3)


def test_a_belief_starts_from_the_prior():
    """P(0.25 <= rate <= 0.75) of Beta(1/2, 1/2), whose distribution is 2/pi asin(sqrt(x)), is 1/3."""
    config = validate_config(CurriculumConfig, {"schedule": "constant", "first": [0.25, 0.75]}, "test")
    curriculum = Curriculum(config, [Difficulty("p", "math", 2, 2, 0, True)], 10, prior=(0.5, 0.5))
    rng = random.Random(0)
    taken = sum(curriculum.miss("unknown", rng) == 0 for _ in range(20_000)) / 20_000
    assert taken == pytest.approx(1 / 3, abs=0.012)
    assert curriculum.belief("p").mean == pytest.approx(2.5 / 3)
    again = Curriculum(config, [], 10, prior=(0.5, 0.5))
    again.restore(json.loads(json.dumps(curriculum.state())))
    assert again.belief("p").mean == pytest.approx(2.5 / 3)


def test_in_a_profile_of_extremes_few_replies_say_much():
    """Of four replies each. With a uniform prior half of the draws would go to prompts passed never or always."""
    passes = {name: {"h": 2, "n": 0, "s": 4}[name[0]] for name in names_of(half=20, never=40, solved=40)}
    difficulties = [Difficulty(name, "math", 4, count, 0, True) for name, count in passes.items()]
    rows = [Row(name, "math", (Message("user", name),)) for name in passes]
    curriculum = {"schedule": "constant", "first": [0.2, 0.8], "reprobe_fraction": 0.0}
    data = {"model": {"path": "m"}, "prompts": {"path": "p"}, "reward": {"name": "math"}, "curriculum": curriculum}
    config = validate_config(RlConfig, data, "test")
    source = prompt_source(config, rows, difficulties, tokenizer=build_tokenizer(), seed=0, steps=config.steps)
    assert kinds(source, 400)["half"] > 340
    uniform = validate_config(CurriculumConfig, curriculum, "test")
    assert kinds(source_of(Curriculum(uniform, difficulties, 10), passes), 400)["half"] < 240


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


def names_of(**counts: int) -> list[str]:
    return [f"{name}{index}" for name, count in counts.items() for index in range(count)]


def kinds(source: PromptSource, draws: int) -> Counter:
    """How many draws went to prompts of each kind, a kind being the name without its number."""
    return Counter(source.draw("math", order).row.id.rstrip("0123456789") for order in range(draws))


def test_solved_prompts_retire_and_impossible_ones_are_parked():
    passes = {name: {"s": 8, "h": 4, "n": 0}[name[0]] for name in names_of(solved=10, half=10, never=10)}
    curriculum = curriculum_of(passes, schedule="constant", first=[0.3, 0.7], half_life=5)
    assert curriculum.figures()["prompts_retired"] == curriculum.figures()["prompts_parked"] == 0  # 8 are not enough
    for name in passes:
        curriculum.observe(name, *{"s": (12, 0), "h": (6, 6), "n": (0, 12)}[name[0]])
    assert curriculum.figures()["prompts_retired"] == curriculum.figures()["prompts_parked"] == 10
    assert {curriculum.state_of("solved0"), curriculum.state_of("never0")} == {"retired", "parked"}
    assert kinds(source_of(curriculum, passes), 300) == {"half": 300}  # the budget counts from the next step on
    curriculum.advance(40, 0.5)  # eight half-lives: little is known any more, but a state does not change by itself
    assert curriculum.figures()["prompts_retired"] == curriculum.figures()["prompts_parked"] == 10
    assert "solved" not in kinds(source_of(curriculum, passes), 300)


def test_a_prompt_comes_back_by_showing_the_contrary_only():
    curriculum = curriculum_of({"never": 0, "solved": 8}, half_life=5)
    curriculum.observe("never", 0, 12)
    curriculum.observe("solved", 12, 0)
    curriculum.advance(60, 0.5)
    curriculum.observe("never", 0, 4)
    curriculum.observe("solved", 4, 0)
    assert (curriculum.state_of("never"), curriculum.state_of("solved")) == ("parked", "retired")
    curriculum.observe("never", 1, 3)
    curriculum.observe("solved", 2, 2)
    assert (curriculum.state_of("never"), curriculum.state_of("solved")) == ("active", "active")


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("parked", [3, 60, 300])
def test_parked_prompts_are_probed_within_the_budget(fraction: float, parked: int):
    """Whether there are few of them or they are nearly all there is."""
    passes = {name: {"h": 8, "n": 0}[name[0]] for name in names_of(half=20, never=parked)}
    config = {"schedule": "constant", "first": [0.3, 0.7], "reprobe_fraction": fraction}
    curriculum = Curriculum(
        validate_config(CurriculumConfig, config, "test"),
        [Difficulty(name, "math", 16, count, 0, True) for name, count in passes.items()],
        steps=10,
    )
    assert curriculum.figures()["prompts_parked"] == parked
    draws = 4000
    drawn = kinds(source_of(curriculum, passes), draws)["never"]
    assert drawn <= draws * fraction + 3 * (draws * fraction) ** 0.5
    assert drawn >= draws * fraction / 4  # the budget is used; with few active ones by less
    for _ in range(5):
        curriculum.observe("never0", 0, 4)
    curriculum.observe("never1", 0, 4, refresh=True)
    assert curriculum.figures()["reprobes"] == 5


def test_where_none_is_active_parked_ones_come_before_retired_ones():
    passes = {name: {"s": 16, "n": 0}[name[0]] for name in names_of(solved=5, never=5)}
    difficulties = [Difficulty(name, "math", 16, count, 0, True) for name, count in passes.items()]
    config = validate_config(CurriculumConfig, {"reprobe_fraction": 0.0}, "test")
    assert kinds(source_of(Curriculum(config, difficulties, 10), passes), 50) == {"never": 50}


def test_rollouts_of_an_older_policy_count_less():
    curriculum = curriculum_of({}, half_life=10)
    curriculum.advance(20, 0.5)
    curriculum.observe("p", 4, 4, version=10)
    assert (curriculum.belief("p").passes, curriculum.belief("p").failures) == (2, 2)


SCHEDULE = """
def halves(step, steps, pass_rate, position):
    assert (step, steps, pass_rate) == (1, 10, 0.25), (step, steps, pass_rate)
    return (1 + position) / 2

def too_few(step, steps):
    return 0.0

def outside(step, steps, pass_rate, position):
    return 1.5

def nothing(step, steps, pass_rate, position):
    pass

def broken(step, steps, pass_rate, position):
    return {}["position"]

number = 3
"""


@pytest.fixture
def schedules(tmp_path: Path) -> Path:
    path = tmp_path / "schedules.py"
    path.write_text(SCHEDULE)
    return path


def test_a_function_of_the_users_moves_the_band(schedules: Path):
    curriculum = curriculum_of({}, schedule=f"{schedules}:halves", first=[0.4, 0.8], last=[0.0, 0.4])
    curriculum.advance(1, 0.25)
    assert curriculum.band == pytest.approx((0.2, 0.6))
    curriculum.advance(1, 0.25)
    assert curriculum.band == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("outside", r"returned 1.5 at step 1; it must return a number from 0 \(the band `first`\) to 1 \(`last`\)"),
        ("nothing", "returned None at step 1"),
        ("broken", r"failed at step 1: KeyError: 'position' \(schedules.py:16\)"),
    ],
)
def test_a_schedule_that_fails_is_one_clear_error(schedules: Path, function: str, message: str):
    curriculum = curriculum_of({}, schedule=f"{schedules}:{function}")
    with pytest.raises(PluginError, match=message):
        curriculum.advance(1, 0.25)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("liner", "schedule: got 'liner': schedule 'liner' is not known.*constant, linear, adaptive"),
        ("{path}:halve", "no function 'halve' in .*did you mean 'halves'"),
        ("{path}:too_few", r"cannot be called with \(step, steps, pass_rate, position\)"),
        ("{path}:number", "is a constant, not a function"),
        ("{path}", "name the function too"),
        ("nowhere.py:halves", "there is no file"),
        ("no_such_package.x:halves", "no module no_such_package"),
    ],
)
def test_a_schedule_that_is_not_there_is_refused_by_the_config(schedules: Path, schedule: str, message: str):
    with pytest.raises(ConfigError, match=message):
        validate_config(CurriculumConfig, {"schedule": schedule.format(path=schedules)}, "test")


def test_checking_a_schedule_executes_nothing(tmp_path: Path):
    path = tmp_path / "loud.py"
    path.write_text("raise SystemExit\ndef f(step, steps, pass_rate, position):\n    return 0.0\n")
    assert validate_config(CurriculumConfig, {"schedule": f"{path}:f"}, "test").schedule == f"{path}:f"


def test_refreshes_go_to_the_prompts_of_which_least_is_known():
    """Long ago, or seldom: evidence fades; parked and retired prompts are among them."""
    difficulties = [Difficulty(f"p{index}", "math", index, 0, 0, True) for index in range(1, 9)]
    difficulties.append(Difficulty("outside", "math", 2, 2, 0, False))
    curriculum = Curriculum(validate_config(CurriculumConfig, {"half_life": 5.0}, "test"), difficulties, 100)
    refilter = Refilter(validate_config(RefilterConfig, {"every": 3, "prompts": 4}, "test"))
    assert [step for step in range(10) if refilter.due(step)] == [3, 6, 9]
    assert set(refilter.choose(curriculum, 3, random.Random(0))) == {"p1", "p2", "outside", "p3"}
    assert refilter.choose(curriculum, 3, random.Random(0), exclude=["p1", "p3"])[2:] == ["p4", "p5"]
    curriculum.advance(30, 0.5)
    for name in ("p1", "p2", "p3", "outside"):
        curriculum.observe(name, 1, 1, version=30, refresh=True)
    assert set(refilter.choose(curriculum, 30, random.Random(0))) == {"p4", "p5", "p6", "p7"}
    assert curriculum.figures()["reprobes"] == 0


def test_a_refresh_brings_prompts_into_the_band_and_out_of_it():
    """What the profile left out starts outside, and comes back when the policy of now passes some of it."""
    difficulties = [
        Difficulty("easy", "math", 8, 8, 0, False),
        Difficulty("hard", "math", 8, 0, 0, False),
        Difficulty("fine", "math", 8, 4, 0, True),
    ]
    config = validate_config(CurriculumConfig, {"schedule": "constant", "first": [0.2, 0.7], "half_life": 5.0}, "test")
    curriculum = Curriculum(config, difficulties, 100)
    assert [curriculum.state_of(name) for name in ("easy", "hard", "fine")] == ["retired", "parked", "active"]
    curriculum.advance(50, 0.5)
    curriculum.observe("hard", 8, 8, version=50, refresh=True)
    curriculum.observe("fine", 16, 0, version=50, refresh=True)
    assert [curriculum.state_of(name) for name in ("easy", "hard", "fine")] == ["retired", "active", "retired"]
    assert kinds(source_of(curriculum, ["easy", "hard", "fine"]), 60) == {"hard": 60}


def test_where_nothing_is_in_the_band_the_nearest_is_drawn():
    curriculum = curriculum_of({"easy": 8, "hard": 0}, schedule="constant", first=[0.999, 1.0])
    source = source_of(curriculum, ["easy", "hard"])
    drawn = Counter(source.draw("math", order).row.id for order in range(100))
    assert drawn["easy"] > 90


def test_draws_continue_after_a_checkpoint():
    names = [f"p{i}" for i in range(20)]
    passes = {name: index % 9 for index, name in enumerate(names)}
    one, two = (source_of(curriculum_of(passes, schedule="adaptive"), names) for _ in range(2))
    for version in range(5):
        one.observe(one.draw("math", version).row.id, 3, 1)
        one.advance(version, 0.7)
    two.restore(json.loads(json.dumps(one.state())))
    assert [one.draw("math", order) for order in range(5, 45)] == [two.draw("math", order) for order in range(5, 45)]
    assert one.advance(6, 0.5) == two.advance(6, 0.5)
