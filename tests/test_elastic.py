"""The number of engines of RL: the policy by hand and in simulated runs, its keys, and engines that join and leave."""

import asyncio
import dataclasses
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
from elastic_simulation import ElasticSimulation

from posttrain.config.base import validate_config
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.forecast.costs import Costs, EngineCosts, TrainerCosts, UpdateCosts
from posttrain.forecast.simulation import Setting, Simulation
from posttrain.pipeline.hashing import _deciding
from posttrain.pipeline.plan import Actor, Step, check_fits
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.elastic import WARM_UP_STEPS, Elastic, scaling_of
from posttrain.rl.loop.scaling import BARRED, Choice, Scaling, StepFigures, Tried


def policy(least=1, most=8, settling=0, engine_cost=1.0, other_cost=1.0) -> Scaling:
    return Scaling(least, most, engine_cost=engine_cost, other_cost=other_cost, settling=settling)


def windows(scaling: Scaling, workers: int, seconds: float, wait: float, work: float):
    """The decisions of four steps, the first of which comes after a change."""
    figures = StepFigures(seconds, wait * seconds, work)
    return [scaling.observe(figures, workers) for _ in range(4)]


def settle(scaling: Scaling, workers: int) -> None:
    assert scaling.observe(StepFigures(1.0, 0.0, 1.0), workers) is None  # a step of before the change


def wanted(scaling: Scaling, workers: int, seconds: float, wait: float, work: float) -> int:
    *early, last = windows(scaling, workers, seconds, wait, work)
    assert early == [None] * 3
    return workers if last is None else last.workers


# --- by hand ---


def test_a_starving_trainer_gets_engines_until_the_next_is_not_worth_its_cost():
    scaling = policy()
    settle(scaling, 1)
    assert wanted(scaling, 1, 4.0, 0.75, 1.0) == 2  # at most twice as many at a time
    settle(scaling, 2)
    assert wanted(scaling, 2, 2.0, 0.5, 1.0) == 4
    settle(scaling, 4)
    assert wanted(scaling, 4, 1.0, 0.02, 0.97) == 4  # the trainer does not wait, and the engines have no time to spare


@pytest.mark.parametrize(
    ("other_cost", "most"),
    # 1.25 times as fast at the most. The second engine makes steps dearer by half, or by a hundredth.
    [(1.0, 2), (99.0, 2), (0.0, 1)],
)
def test_an_engine_is_asked_for_if_it_is_worth_its_cost(other_cost, most):
    scaling = policy(other_cost=other_cost)
    settle(scaling, 1)
    # Without other costs a second engine doubles the cost of a step: 1 + 1 / 4 = 1.25 times as fast is the least.
    assert wanted(scaling, 1, 4.0, 0.19, 1.0) == most


def test_engines_without_work_leave_as_far_as_the_rest_can_do_it():
    scaling = policy()
    settle(scaling, 8)
    assert wanted(scaling, 8, 1.0, 0.0, 0.2) == 4  # at most half at a time; 8 * 0.2 / 0.9 = 1.8 would do
    settle(scaling, 4)
    assert wanted(scaling, 4, 1.0, 0.0, 0.4) == 2
    settle(scaling, 2)
    assert wanted(scaling, 2, 1.0, 0.0, 0.8) == 2  # one would have 1.6 times as much work as time


def test_between_both_rules_nothing_happens():
    scaling = policy(other_cost=0.0)
    settle(scaling, 3)
    for wait, work in ((0.04, 0.7), (0.0, 0.61), (0.03, 1.0), (0.06, 0.3)):
        assert wanted(scaling, 3, 1.0, wait, work) == 3


def test_a_change_that_was_not_worth_it_is_taken_back_and_not_tried_again_soon():
    scaling = policy()
    settle(scaling, 1)
    assert wanted(scaling, 1, 2.0, 0.6, 1.0) == 2
    settle(scaling, 2)
    assert wanted(scaling, 2, 2.0, 0.6, 1.0) == 1  # both engines share the same cores
    settle(scaling, 1)
    tries = [wanted(scaling, 1, 2.0, 0.6, 1.0) for _ in range(BARRED)]
    assert tries == [1] * (BARRED - 1) + [2]
    settle(scaling, 2)
    assert wanted(scaling, 2, 2.0, 0.6, 1.0) == 1
    settle(scaling, 1)
    assert [wanted(scaling, 1, 2.0, 0.6, 1.0) for _ in range(2 * BARRED)] == [1] * (2 * BARRED - 1) + [2]


def test_an_engine_that_is_missed_comes_back():
    scaling = policy()
    settle(scaling, 4)
    assert wanted(scaling, 4, 1.0, 0.0, 0.4) == 2
    settle(scaling, 2)
    assert wanted(scaling, 2, 1.5, 0.0, 1.0) == 4  # steps became slower by more than was saved
    settle(scaling, 4)
    assert wanted(scaling, 4, 1.0, 0.0, 0.4) == 4


def test_if_two_more_were_not_worth_it_one_more_may_be():
    scaling = policy()
    settle(scaling, 2)
    assert wanted(scaling, 2, 2.0, 0.5, 1.0) == 4
    settle(scaling, 4)
    assert wanted(scaling, 4, 1.9, 0.5, 1.0) == 2
    settle(scaling, 2)
    assert wanted(scaling, 2, 2.0, 0.5, 1.0) == 3


FORECAST = [Tried(workers, 48.0 / workers, 0.9) for workers in range(1, 7)]


def test_engines_that_make_steps_no_faster_than_a_forecast_expects_of_fewer_leave():
    scaling = policy(most=6)
    scaling.expect(FORECAST)
    settle(scaling, 6)
    assert wanted(scaling, 6, 13.0, 0.8, 1.0) == 4  # 48 / 6 = 8 s were expected of 6, and 12 s of 4
    settle(scaling, 4)
    assert wanted(scaling, 4, 12.0, 0.8, 1.0) == 5  # 6 are no better than 4, and 5 have not been tried
    settle(scaling, 5)
    assert wanted(scaling, 5, 12.0, 0.8, 1.0) == 4
    settle(scaling, 4)
    assert [wanted(scaling, 4, 12.0, 0.8, 1.0) for _ in range(BARRED)] == [4] * BARRED


def test_at_most_half_of_the_engines_leave_at_a_time_and_they_come_back_if_they_are_missed():
    scaling = policy(most=6)
    scaling.expect(FORECAST)
    settle(scaling, 6)
    assert wanted(scaling, 6, 50.0, 0.8, 1.0) == 3  # one was expected to do as well
    settle(scaling, 3)
    assert wanted(scaling, 3, 70.0, 0.8, 1.0) == 6
    settle(scaling, 6)
    assert wanted(scaling, 6, 50.0, 0.8, 1.0) == 6  # the forecast is not asked again


@pytest.mark.parametrize(("seconds", "workers"), [(7.0, 6), (9.5, 6), (9.7, 5), (11.9, 5), (12.1, 4)])
def test_engines_that_are_as_fast_as_a_forecast_expects_stay(seconds, workers):
    scaling = policy(most=6)
    scaling.expect(FORECAST)
    settle(scaling, 6)
    assert wanted(scaling, 6, seconds, 0.8, 1.0) == workers


def test_steps_of_before_a_change_do_not_count():
    scaling = policy(settling=3)
    starving = StepFigures(4.0, 3.0, 1.0)
    assert [scaling.observe(starving, 1) for _ in range(1 + 3 + 3)] == [None] * 7
    decision = scaling.observe(starving, 1)
    assert decision is not None
    assert decision.workers == 2
    assert [scaling.observe(starving, 1, is_changing=True) for _ in range(20)] == [None] * 20


def test_quick_steps_are_watched_for_some_seconds():
    scaling = policy()
    settle(scaling, 1)
    decisions = [scaling.observe(StepFigures(0.25, 0.2, 1.0), 1) for _ in range(16)]
    assert decisions[:-1] == [None] * 15
    assert decisions[-1] is not None


def test_engines_that_cannot_be_had_are_not_asked_for_again_at_once():
    scaling = policy()
    settle(scaling, 1)
    assert wanted(scaling, 1, 4.0, 0.75, 1.0) == 2
    scaling.refused(1)
    assert [wanted(scaling, 1, 4.0, 0.75, 1.0) for _ in range(BARRED)] == [1] * (BARRED - 1) + [2]


def test_the_limits_are_kept_and_a_lost_engine_is_asked_for_again():
    scaling = policy(2, 3)
    settle(scaling, 2)
    assert wanted(scaling, 2, 4.0, 0.9, 1.0) == 3
    settle(scaling, 3)
    assert wanted(scaling, 3, 4.0 / 1.5, 0.0, 0.1) == 2
    settle(scaling, 1)  # one was lost
    assert wanted(scaling, 1, 4.0, 0.0, 1.0) == 2


def test_figures_without_sense_keep_the_number_within_its_limits():
    source = random.Random(0)
    scaling, workers = policy(2, 6, settling=1), 2
    for _ in range(5000):
        seconds = source.choice([0.01, 1.0, 30.0])
        figures = StepFigures(seconds, source.random() * seconds, source.random())
        decision = scaling.observe(figures, workers, is_changing=source.random() < 0.05)
        if decision is not None:
            assert 2 <= decision.workers <= 6
            assert decision.workers != workers
            assert decision.workers <= 2 * workers
            workers = decision.workers


# --- in simulated runs ---


def setting(engines: int, *, train_s: float, max_staleness: int = 3, cores: float | None = None) -> Setting:
    """Groups of 4 replies of various lengths. An engine makes a batch in about 2 s."""

    def draw(source: random.Random, capability: str, step: int):
        return [max(1, min(400, int(source.lognormvariate(4, 0.6)))) for _ in range(4)], source.random() >= 0.2

    costs = Costs(EngineCosts(0.004, 0.0004), TrainerCosts(train_s, 0.0), UpdateCosts(0.0, 0.01), cores=cores)
    return Setting(costs, draw, engines, max_seqs=16, groups_per_step=8, max_staleness=max_staleness)


def steady_s(simulation: Simulation, steps: int) -> float:
    """Seconds of a step, over the last third."""
    trace = simulation.run(steps)
    kept = trace.steps[2 * steps // 3 :]
    return (kept[-1].began - kept[0].began) / (len(kept) - 1)


def best_fixed_s(base: Setting, most: int) -> dict[int, float]:
    return {n: steady_s(Simulation(dataclasses.replace(base, engines=n)), 60) for n in range(1, most + 1)}


@pytest.mark.parametrize("train_s", [0.15, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("first", [1, 6])
@pytest.mark.parametrize("max_staleness", [1, 3])
def test_a_run_with_too_few_or_too_many_engines_comes_close_to_the_best_number(train_s, first, max_staleness):
    base = setting(first, train_s=train_s, max_staleness=max_staleness)
    best = min(best_fixed_s(base, 6).values())
    scaling = policy(1, 6, settling=1 + max_staleness)
    run = ElasticSimulation(base, scaling, join_s=5.0)
    assert best / steady_s(run, 150) >= 0.85, run.numbers


@pytest.mark.parametrize("first", [1, 6])
def test_engines_that_the_trainer_does_not_need_are_given_back(first):
    run = ElasticSimulation(setting(first, train_s=5.0), policy(1, 6, settling=4), join_s=5.0)
    run.run(80)
    assert run.numbers[-1] == 1


def test_engines_that_share_two_cores_do_not_pile_up():
    run = ElasticSimulation(setting(1, train_s=0.5, cores=2.0), policy(1, 6, settling=4), join_s=5.0)
    run.run(200)
    assert sum(run.numbers[60:]) / len(run.numbers[60:]) < 3.5, run.numbers


def test_a_settled_run_changes_seldom():
    run = ElasticSimulation(setting(1, train_s=0.4), policy(1, 6, settling=4), join_s=5.0)
    run.run(300)
    late = run.numbers[100:]
    assert sum(one != other for one, other in itertools.pairwise(late)) <= 8, run.numbers


def test_no_group_is_lost_when_engines_leave():
    base = setting(6, train_s=2.0)
    run = ElasticSimulation(base, policy(1, 6, settling=4), join_s=5.0)
    trace = run.run(60)
    assert len(trace.steps) >= 60
    assert max(step.staleness for step in trace.steps) <= 3


# --- the keys ---


def rl_config(**changed):
    data = {
        "model": {"path": "policy"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "math"},
        "resources": {"rollout": {"workers": {"min": 1, "max": 4}}},
        **changed,
    }
    return validate_config(RlConfig, data, "rl.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resources": {"rollout": {"workers": {"min": 4, "max": 4}}}}, "max must be above min; .* write workers: 4"),
        ({"resources": {"rollout": {"workers": {"min": 0, "max": 4}}}}, "workers"),
        ({"resources": {"rollout": {"workers": {"min": 2}}}}, "max"),
        ({"resources": {"rollout": {"workers": {"least": 2, "max": 4}}}}, "least: unknown key"),
        ({"deterministic": True, "max_staleness": 0}, r"resources.rollout.workers 1 \(got min 1, max 4\)"),
        (
            {"weights": {"backend": "nccl"}},
            "nccl connects a fixed number of engines, so resources.rollout.workers must be one number",
        ),
    ],
)
def test_what_does_not_go_with_a_range_of_engines_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        rl_config(**changed)


def test_resources_auto_is_a_range_whose_number_a_forecast_chooses():
    rollout = rl_config(resources="auto").resources.rollout
    assert (rollout.least, rollout.most, rollout.is_forecast) == (1, 64, True)
    assert not rl_config().resources.rollout.is_forecast
    with pytest.raises(ConfigError, match="resources"):
        rl_config(resources="automatic")


def test_a_stage_asks_for_the_engines_it_begins_with_and_holds_those_it_may_take():
    config = rl_config()
    assert (config.resources.rollout.least, config.resources.rollout.most) == (1, 4)
    assert config.resources.rollout.fixed(1) == ActorResources()
    step = Step(
        "rl",
        "rl",
        "resources",
        {},
        {},
        (Actor("rollout", 1, 1.0, 0.5, "-", most=4), Actor("trainer", 2, 1.0, 0.0, "-")),
    )
    assert (step.cpus, step.held_cpus, step.gpus, step.held_gpus) == (3.0, 6.0, 0.5, 2.0)
    check_fits([step], "here", cpus=3, gpus=1)
    with pytest.raises(ConfigError, match=r"asks for 3 CPUs \(rollout 1 × 1, trainer 2 × 1\), but there are 2; lower"):
        check_fits([step], "here", cpus=2, gpus=1)


def test_of_engines_that_are_too_many_the_number_that_would_fit_is_told():
    def step(engines: int, each: float) -> Step:
        actors = (Actor("rollout", engines, each, 0.0, "-"), Actor("trainer", 1, 2.0, 0.0, "-"))
        return Step("rl", "rl", "resources", {}, {}, actors)

    with pytest.raises(ConfigError, match=r"there are 5; rollout.workers: 3 would fit; lower"):
        check_fits([step(5, 1.0)], "here", cpus=5, gpus=0)
    with pytest.raises(ConfigError, match=r"there are 5; lower resources"):
        check_fits([step(1, 4.0)], "here", cpus=5, gpus=0)


def test_a_run_that_was_interrupted_may_go_on_with_other_ranks_and_engines():
    one, other = rl_config(), rl_config(parallel={"processes": 4, "zero": 3}, resources={"rollout": {"workers": 2}})
    assert _deciding(one) == _deciding(other)
    assert _deciding(one) != _deciding(rl_config(max_staleness=1))


def test_the_costs_of_the_policy_are_gpus_or_else_cpus():
    def costs(**resources):
        scaling = scaling_of(rl_config(resources=resources, parallel={"processes": 4}))
        return scaling._engine_cost, scaling._other_cost

    workers = {"min": 1, "max": 4}
    assert costs(rollout={"workers": workers, "cpus": 0.5}, trainer={"cpus": 2.0}) == (0.5, 8.0)
    assert costs(rollout={"workers": workers, "gpus": 2.0}, trainer={"gpus": 1.0}) == (2.0, 4.0)


# --- the loop: a forecast, and a run that is continued ---


class Workers:
    """As many workers as there are names, which have always something to do."""

    def __init__(self, count: int):
        self.counted = list(range(count))
        self.loads = SimpleNamespace(looked=0, at_work=0)


def loop_of(tmp_path, monkeypatch, count: int, hosts_have: int = 6, **given):
    """A loop whose engines join and leave at once, and the events that it writes. hosts_have: room for so many."""
    workers: Any = Workers(count)

    async def join(loop) -> None:
        workers.counted.append(len(workers.counted))

    async def leave(loop, worker) -> None:
        workers.counted.remove(worker)

    monkeypatch.setattr(Elastic, "_join", join)
    monkeypatch.setattr(Elastic, "_leave", leave)
    monkeypatch.setattr(Elastic, "_to_leave", lambda loop, number: workers.counted[:number])
    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")

    async def room() -> int:
        return hosts_have - len(workers.counted)

    engines: Any = SimpleNamespace(room=room)
    config = rl_config(resources={"rollout": {"workers": {"min": 1, "max": 4, "forecast": True}}})
    loop = Elastic(
        config, context, workers, engines=engines, prompts=[], stop_ids=(), tolerance=1.0, changed=lambda *_: None,
        **given,
    )  # fmt: skip

    async def run(steps: list[tuple[float, float]]) -> None:
        task = asyncio.create_task(loop.run())
        for seconds, waited in steps:
            workers.loads.looked += 10
            workers.loads.at_work += 10
            loop.step(seconds, waited)
            for _ in range(20):
                await asyncio.sleep(0.001)
        task.cancel()

    def events() -> list[dict]:
        return list(read_jsonl(context.events)) if context.events.exists() else []

    return workers, lambda steps: asyncio.run(run(steps)), events


def test_after_some_steps_a_forecast_chooses_and_then_the_policy_goes_on(tmp_path, monkeypatch):
    asked = []

    def forecast(room: int) -> Choice:
        asked.append(room)
        return Choice(3, (Tried(1, 4.0, 0.75), Tried(3, 1.4, 0.1)), "the third is worth its cost", "{}")

    workers, run, events = loop_of(tmp_path, monkeypatch, 1, forecast=forecast)
    run([(2.0, 1.5)] * WARM_UP_STEPS)  # and the first, which waits for what starts
    assert not asked
    run([(2.0, 1.5)] * 2)
    assert asked == [1 + 5]
    assert len(workers.counted) == 3
    [event] = events()
    assert (event["event"], event["workers"], event["before"]) == ("engines_forecast", 3, 1)
    assert event["reason"] == "the third is worth its cost"
    assert event["tried"][1] == {"workers": 3, "step_s": 1.4, "waits": 0.1}
    run([(2.0, 1.5)] * 40)  # the trainer still waits: the policy wants another one
    assert [line["event"] for line in events()][1] == "engines_wanted"
    assert len(asked) == 1


def test_quick_steps_warm_up_for_some_seconds(tmp_path, monkeypatch):
    asked = []
    _, run, _ = loop_of(tmp_path, monkeypatch, 1, forecast=asked.append)
    run([(0.1, 0.05)] * 100)
    assert not asked


def test_a_forecast_that_cannot_be_made_leaves_the_number_to_the_policy(tmp_path, monkeypatch):
    def forecast(room: int) -> Choice:
        raise ConfigError("--calibrate", ["the run has 2 events engine_load"])

    _, run, events = loop_of(tmp_path, monkeypatch, 1, forecast=forecast)
    run([(2.0, 1.5)] * (WARM_UP_STEPS + 40))
    assert "the run has 2 events" in events()[0]["reason"]
    assert [line["event"] for line in events()][:2] == ["engines_not_forecast", "engines_wanted"]
    assert events()[1]["workers"] == 2


def test_a_run_that_is_continued_begins_with_the_engines_that_it_had(tmp_path, monkeypatch):
    workers, run, events = loop_of(tmp_path, monkeypatch, 1, forecast=pytest.fail, had=3)
    run([(2.0, 0.0)])
    assert len(workers.counted) == 3
    assert events()[0]["reason"] == "the run had so many when it was interrupted"
    _, run, events = loop_of(tmp_path / "again", monkeypatch, 1, had=9)  # its range has become smaller
    (tmp_path / "again").mkdir()
    run([(2.0, 0.0)])
    assert events()[0]["workers"] == 4


def test_an_engine_that_no_host_has_room_for_is_not_waited_for(tmp_path, monkeypatch):
    """The trainer starves through about 50 windows. Each time the policy waits twice as long before it asks again."""
    workers, run, events = loop_of(tmp_path, monkeypatch, 2, hosts_have=3)
    run([(2.0, 1.8)] * 20)
    assert [line["event"] for line in events()] == ["engines_wanted", "engines_limited"]
    assert (events()[0]["workers"], events()[1]["wanted"], events()[1]["room"]) == (4, 4, 3)
    assert len(workers.counted) == 3  # what there was room for has joined

    workers, run, events = loop_of(tmp_path / "full", monkeypatch, 1, hosts_have=1)
    (tmp_path / "full").mkdir()
    run([(2.0, 1.5)] * 200)
    asked = [line["event"] for line in events()]
    assert asked == ["engines_wanted", "engines_limited"] * (len(asked) // 2)
    assert 2 <= len(asked) // 2 <= 4
    assert len(workers.counted) == 1
