"""Forecasts of RL on a cluster: the simulation against hand-computed runs and invariants, and the command."""

import itertools
import json
import os
import random
import re
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.cli.main import main
from posttrain.config.base import load_config, validate_config
from posttrain.context import StageContext
from posttrain.errors import ConfigError
from posttrain.forecast.actors import Engine, SimulatedGroup
from posttrain.forecast.calibration import _cores, calibrate, fit_steps
from posttrain.forecast.config import ClusterConfig, DeviceConfig
from posttrain.forecast.costs import Costs, EngineCosts, TrainerCosts, UpdateCosts, scaled
from posttrain.forecast.engines import choose_engines, choose_for_run
from posttrain.forecast.forecast import with_engines
from posttrain.forecast.hardware import engine_costs, trainer_costs
from posttrain.forecast.outcome import find_bottleneck, simulate
from posttrain.forecast.replies import SampledGroup, SampledGroups
from posttrain.forecast.simulation import Setting, Simulation
from posttrain.planning.sizes import count_sizes, find_model, read_config
from posttrain.resources import bundled, bundled_names
from posttrain.rl.config import RlConfig
from posttrain.sampling.step_sums import sums_of_step

NO_UPDATE = UpdateCosts(0.0, 0.0, recomputes=False)


def equal_lengths(length: int, size: int = 4):
    return lambda source, capability, step: ([length] * size, True)


def spread_lengths(drop_rate: float, most: int = 400, size: int = 4):
    def draw(source: random.Random, capability: str, step: int):
        return [max(1, min(most, int(source.lognormvariate(3, 1)))) for _ in range(size)], source.random() >= drop_rate

    return draw


def setting(**changed) -> Setting:
    costs = Costs(EngineCosts(0.01, 0.0), TrainerCosts(1.0, 0.0), NO_UPDATE)
    base = Setting(costs, equal_lengths(100), engines=1, max_seqs=16, groups_per_step=4, max_staleness=0)
    return replace(base, **changed)


# --- an engine ---


def ends_of(lengths: list[int], costs: EngineCosts, max_seqs: int, *, prompt: int = 0, padded: bool = False):
    """When each of these replies, of groups of one, ends."""
    ends: dict[int, float] = {}
    now = 0.0
    engine = Engine(
        "engine-0", costs, max_seqs, prompt_tokens=prompt, finished=lambda group: ends.update({group.order: now}),
        padded=padded,
    )  # fmt: skip
    for order, length in enumerate(lengths):
        engine.send(SimulatedGroup(order, [length], True, 0), [length], 0.0)
    while engine.is_busy:
        now = engine.next_end()
        engine.end_first(now)
    return [ends[order] for order in range(len(lengths))], engine


def test_an_engine_takes_a_step_for_each_token_and_a_waiting_reply_takes_the_first_free_place():
    ends, engine = ends_of([10, 20, 5], EngineCosts(0.1, 0.0), 2)
    assert ends == pytest.approx([1.0, 2.0, 1.5])
    assert engine.tokens == pytest.approx(35)
    assert engine.busy_s == pytest.approx(2.0)


def test_a_step_costs_its_sequences_and_their_context():
    # Two sequences with a prompt of 100: step j costs 0.1 + 2 * 0.01 + 0.001 * (200 + 2 j).
    costs = EngineCosts(0.1, 0.0, prefill_s=0.0, dense_s=0.02, context_s=0.001)
    ends, _ = ends_of([3, 3], costs, 2, prompt=100)
    assert ends[0] == pytest.approx(3 * 0.12 + 0.001 * (3 * 200 + 2 * 9 / 2))  # context grows evenly within a step


def test_experts_are_read_once_however_many_tokens_need_them():
    costs = EngineCosts(0.0, 0.0, experts_s=1.0, idle_expert=0.75)
    assert costs.decode_s(1) == pytest.approx(0.25)
    assert costs.decode_s(2) == pytest.approx(1 - 0.75**2)
    assert costs.decode_s(200) == pytest.approx(1.0)


def test_a_padded_batch_is_refilled_when_its_longest_reply_has_ended():
    ends, _ = ends_of([10, 20, 5], EngineCosts(0.1, 0.0), 2, padded=True)
    assert ends == pytest.approx([1.0, 2.0, 2.5])


def test_an_engine_that_pauses_for_weights_and_computes_its_context_again_ends_later():
    ends: list[float] = []
    engine = Engine(
        "engine-0", EngineCosts(0.1, 0.0, prefill_s=0.01), 4, prompt_tokens=20, finished=lambda group: ends.append(0)
    )
    group = SimulatedGroup(0, [10], True, 0)
    engine.send(group, [10], 0.0)
    assert engine.next_end() == pytest.approx(0.2 + 1.0)  # the prompt, then ten steps
    engine.update(1, 0.7, pause_s=0.5, recomputes=True)
    assert engine.next_end() == pytest.approx(0.7 + 0.5 + 0.25 + 0.5)  # 25 tokens again, then the five steps left
    assert (group.oldest, engine.version) == (0, 1)


# --- whole runs ---


def test_on_policy_a_step_is_sampling_then_training():
    trace = Simulation(setting()).run(6)
    # 16 sequences fit at once: 100 steps of 10 ms, then a second of training, and so on.
    assert [step.began for step in trace.steps] == pytest.approx([1, 3, 5, 7, 9, 11])
    assert {step.staleness for step in trace.steps} == {0}
    assert trace.busy_s["trainer"] == pytest.approx(5.0)


def test_with_staleness_sampling_and_training_overlap():
    found = simulate(setting(max_staleness=1))
    assert found.step_s == pytest.approx(1.0, rel=0.02)
    assert simulate(setting()).step_s == pytest.approx(2.0)
    assert found.idle["trainer"] == pytest.approx(0.0, abs=0.02)


def test_programs_that_share_cores_slow_each_other():
    costs = Costs(EngineCosts(0.01, 0.0), TrainerCosts(1.0, 0.0), NO_UPDATE, cores=1.0)
    assert simulate(setting(costs=costs, max_staleness=1)).step_s == pytest.approx(2.0, rel=0.02)
    wide = replace(costs, cores=2.0)
    assert simulate(setting(costs=wide, max_staleness=1)).step_s == pytest.approx(1.0, rel=0.02)


def test_the_trainer_waits_for_engines_that_still_take_the_weights_of_the_step_before():
    costs = Costs(EngineCosts(0.0001, 0.0), TrainerCosts(0.1, 0.0), UpdateCosts(2.0, 0.0, recomputes=False))
    assert simulate(setting(costs=costs, max_staleness=4)).step_s == pytest.approx(2.0, rel=0.05)


def test_a_judge_and_slow_rewards_hold_groups_up():
    plain = simulate(setting()).step_s
    costs = setting().costs
    judged = setting(costs=replace(costs, judge=EngineCosts(0.02, 0.0)), judges=1, judge_tokens=10)
    assert simulate(judged).step_s == pytest.approx(plain + 0.2)
    slow = setting(costs=replace(costs, reward_s=0.5), reward_workers=1)
    assert simulate(slow).step_s == pytest.approx(plain + 4 * 0.5)


def test_first_replies_are_sampled_and_scored_before_the_others_and_a_stopped_group_has_no_others():
    costs = replace(setting().costs, reward_s=0.25, reference_s=0.5)
    found = simulate(setting(costs=costs, first_replies=2))
    # 100 steps of 10 ms and the rewards, twice; the log-probabilities of the reference once; a second of training.
    assert found.step_s == pytest.approx(2 * 1.25 + 0.5 + 1.0)

    def every_second(source: random.Random, capability: str, step: int):
        return next(draws)

    draws = itertools.cycle([([100] * 4, True), ([100] * 2, False)])
    trace = Simulation(setting(draw=every_second, first_replies=2)).run(5)
    trained = sum(step.tokens for step in trace.steps)
    assert trained == 5 * 4 * 400
    assert trace.dropped > 10
    assert sum(trace.sampled.values()) == pytest.approx(trained + 200 * trace.dropped, abs=4 * 400)


def test_a_judge_scores_first_replies_and_others_once_each():
    costs = replace(setting().costs, judge=EngineCosts(0.02, 0.0))
    trace = Simulation(setting(costs=costs, judges=1, judge_tokens=10, first_replies=2)).run(3)
    assert trace.judged == pytest.approx(3 * 16 * 10)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 3), st.sampled_from(["pace", "wait", "drop"]), st.floats(0, 0.7),
    st.integers(0, 10**6), st.sampled_from([None, 2]),
)  # fmt: skip
def test_no_run_breaks_the_bound_or_works_more_than_the_time_that_passed(
    engines, staleness, mode, drop_rate, seed, first
):
    costs = Costs(EngineCosts(0.003, 1e-4), TrainerCosts(0.2, 1e-4), UpdateCosts(0.1, 0.02), reward_s=0.05, cores=2.0)
    given_ = setting(
        costs=costs, draw=spread_lengths(drop_rate), engines=engines, max_staleness=staleness, mode=mode,
        over_provision=0.5, first_replies=first,
    )  # fmt: skip
    trace = Simulation(given_, seed).run(8)
    assert all(0 <= step.staleness <= staleness for step in trace.steps)
    assert [step.began for step in trace.steps] == sorted(step.began for step in trace.steps)
    assert all(busy <= trace.end + 1e-6 for busy in trace.busy_s.values())
    for intervals in trace.busy.values():
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(intervals))
    # Every token that was trained on has been sampled, at the speed that the costs allow.
    assert sum(step.tokens for step in trace.steps) <= sum(trace.sampled.values()) + 1e-3
    assert sum(trace.sampled.values()) <= engines * given_.max_seqs * trace.end / 0.003


def test_more_spread_at_the_same_mean_costs_turns_more_than_asynchronous_runs():
    def ratio(sigma: float) -> float:
        def draw(source: random.Random, capability: str, step: int):
            return [max(1, int(source.lognormvariate(5 - sigma**2 / 2, sigma))) for _ in range(4)], True

        base = setting(draw=draw, engines=2, max_seqs=16, groups_per_step=16)
        return simulate(base).step_s / simulate(replace(base, max_staleness=4)).step_s

    assert ratio(1.2) > ratio(0.6) > ratio(0.0)


# --- costs ---


def test_an_engine_of_twice_the_devices_reads_its_weights_in_half_the_time():
    sizes = count_sizes(read_config(find_model("llama4-scout")))
    device = load_config(DeviceConfig, bundled("configs", "devices/h100"))
    whole, half = (engine_costs(sizes, device, devices=n, dtype="bfloat16") for n in (8, 16))
    assert half.experts_s == pytest.approx(whole.experts_s / 2)
    # 96.6B routed weights of 2 bytes over 8 devices at 62% of 3.35 TB/s.
    assert whole.experts_s == pytest.approx(96.637e9 * 2 / (8 * 3.35e12 * 0.62), rel=1e-3)
    # The published case from which decode_efficiency and engine_step_s come: 64 sequences, 18 ms between tokens.
    assert whole.decode_s(64) == pytest.approx(0.018, rel=0.1)


def test_training_takes_six_operations_a_weight_that_a_token_uses():
    sizes = count_sizes(read_config(find_model("llama4-scout")))
    device = load_config(DeviceConfig, bundled("configs", "devices/h200"))
    costs = trainer_costs(sizes, device, devices=16, checkpointing="full")
    assert costs.token_s == pytest.approx(6 * sizes.active / (16 * 989e12 * 0.3))


@pytest.mark.parametrize("name", [name for name in bundled_names("configs") if name.startswith("devices/")])
def test_bundled_devices_name_their_sources(name: str):
    device = load_config(DeviceConfig, bundled("configs", name))
    assert len(device.source) > 100


# --- calibration ---


def sums_of(steps: list[tuple[int, int]], costs: EngineCosts) -> list[float]:
    """What an engine sums up over steps with so many sequences and tokens of prompts, which take what `costs` say."""
    rows = [sums_of_step(c, p, costs.decode_s(c) + p * costs.prefill_s) for c, p in steps]
    return [sum(values) for values in zip(*rows, strict=True)]


@given(
    st.tuples(*[st.sampled_from([0.0, 1e-5, 3e-4, 0.02])] * 3),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 900)), min_size=6, max_size=40, unique=True),
)
def test_the_costs_of_an_engine_are_found_again_from_the_sums_of_its_steps(costs, steps):
    known = EngineCosts(*costs)
    half = len(steps) // 2
    found = fit_steps([sums_of(steps[:half], known), sums_of(steps[half:], known)])
    for sequences, prompt_tokens in steps:
        expected = known.decode_s(sequences) + prompt_tokens * known.prefill_s
        assert found.decode_s(sequences) + prompt_tokens * found.prefill_s == pytest.approx(
            expected, rel=1e-3, abs=1e-5
        )


def test_no_cost_of_an_engine_is_below_zero():
    """Steps of two sequences take three times as long as steps of one: a step would cost less than nothing."""
    rows = [sums_of_step(1, 0, 0.1), sums_of_step(2, 0, 0.3)]
    found = fit_steps(rows)
    assert (found.step_s, found.prefill_s) == (0.0, 0.0)
    assert found.token_s == pytest.approx((1 * 0.1 + 2 * 0.3) / 5)  # the line through 0 with the least squares


def test_an_engine_that_kept_no_sums_is_told():
    with pytest.raises(ConfigError, match="no events engine_steps"):
        fit_steps([])


def recorded_run(folder: Path, *, steps: int = 8, slowdown: float = 1.5, wall_s: float = 1.0) -> Path:
    """A run directory with what a calibration reads, of which the costs are known.

    slowdown: of a step, by others. wall_s: from a step to the next.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    stage = folder / "rl"
    (stage / "rollouts").mkdir(parents=True)
    config = {
        "model": {"path": "policy", "dtype": "float32"}, "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "math"}, "group_size": 2, "groups_per_step": 4,
    }  # fmt: skip
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    context = StageContext("rl", stage, folder / "events.jsonl")
    for step in range(steps):
        tokens = 1000 + 100 * step
        cpu_s = 0.2 + 1e-4 * (tokens + 4 * 7)  # four groups, whose prompts have seven tokens
        context.metrics(
            step,
            {
                "tokens_trained": tokens,
                "groups_trained": 4,
                "step_wall_s": wall_s,
                "train_cpu_s": cpu_s,
                "train_s": slowdown * cpu_s,
                "publish_s": 0.0,
                "engines": 1,
            },
        )
        known = EngineCosts(0.01, 1e-3, 1e-4)
        sums = sums_of([(4 + 4 * step, 0), (4 + 4 * step, 30 * step), (1, 5)], known)
        context.event("engine_steps", engine="engine-0", sums=sums)
        rows = [
            {"group_id": f"{step}-{group}", "num_tokens": 10 * (group + 1), "status": status, "capability": "math",
             "reward": float(index * (group == 0)), "prompt_ids": [1] * 7}
            for group, status in enumerate(("trained", "dropped:zero_advantage", "dropped:finished"))
            for index in range(2)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), stage / "rollouts" / f"step_{step:06d}.parquet")
    context.busy("engine-0", "update_weights", start=10.0, end=10.05)
    return folder


def test_a_calibration_finds_the_costs_of_a_run(tmp_path: Path):
    found = calibrate(recorded_run(tmp_path))
    costs = found.costs
    known = Costs(EngineCosts(0.01, 1e-3, 1e-4), TrainerCosts(0.2, 1e-4), UpdateCosts(0.0, 0.05))
    unexplained = costs.trainer.fixed_s / known.trainer.fixed_s
    expected = scaled(known, unexplained)
    for mine, its in (
        (expected.engine, costs.engine),
        (expected.trainer, costs.trainer),
        (expected.update, costs.update),
    ):
        assert astuple(its) == pytest.approx(astuple(mine))
    assert found.groups.prompt_tokens == 7
    draws = [found.groups.draw(found.config)(random.Random(seed), "math", 3) for seed in range(50)]
    assert {tuple(lengths) for lengths, _ in draws} == {(10, 10), (20, 20)}  # what was dropped for its end is left out
    assert {kept for _, kept in draws} == {True, False}


def test_what_a_run_took_longer_than_its_simulation_is_spread_over_all_costs(tmp_path: Path):
    found = calibrate(recorded_run(tmp_path / "a", wall_s=1.0, slowdown=1.0))
    slower = calibrate(recorded_run(tmp_path / "b", wall_s=3.0, slowdown=1.0))
    assert astuple(slower.costs.engine) == pytest.approx(astuple(scaled(found.costs, 3.0).engine))
    assert found.costs.cores == slower.costs.cores == os.cpu_count()


@pytest.mark.parametrize("slowdown", [1.0, 1.5])
@pytest.mark.parametrize("wall_s", [0.1, 0.7, 5.0])
def test_the_run_that_a_forecast_is_calibrated_on_is_forecast_as_it_was(slowdown, wall_s, tmp_path: Path):
    found = calibrate(recorded_run(tmp_path, wall_s=wall_s, slowdown=slowdown))
    planned = found.setting(setting(groups_per_step=4, max_staleness=found.config.max_staleness), found.config)
    again = fmean(simulate(planned, steps=8, seed=seed).step_s for seed in range(3))
    assert again == pytest.approx(wall_s, rel=0.02)


def test_cores_are_those_with_which_the_simulation_takes_as_long_as_the_run():
    assert _cores(lambda cores: 2.0 / cores, 1.6, most=4.0) == pytest.approx(1.25, abs=0.05)
    assert _cores(lambda cores: 2.0 / cores, 99.0, most=4.0) == pytest.approx(0.5, abs=0.05)
    assert _cores(lambda cores: 2.0 / cores, 0.01, most=4.0) == pytest.approx(4.0, abs=0.05)


def groups_of(config: RlConfig, *pool: SampledGroup) -> SampledGroups:
    return SampledGroups(config, {(0, "math"): pool}, {"math": 1.0}, (1.0, 1.0))


def drawn(groups: SampledGroups, config: RlConfig, number: int = 60) -> list[tuple[int, bool]]:
    """(replies, whether it is kept) of so many draws."""
    draw = groups.draw(config)
    return [(len(lengths), kept) for seed in range(number) for lengths, kept in [draw(random.Random(seed), "math", 0)]]


def sampled(status: str, *rewards: float) -> SampledGroup:
    return SampledGroup(tuple((10 + index, reward) for index, reward in enumerate(rewards)), status)


def config_of(**changed) -> RlConfig:
    data = {
        "model": {"path": "policy", "dtype": "float32"}, "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "math"}, "group_size": 4, "groups_per_step": 4, **changed,
    }  # fmt: skip
    return validate_config(RlConfig, data, "rl.yaml")


def test_groups_that_a_run_stopped_stay_as_short_and_others_are_stopped_where_the_planned_run_may():
    """In the run, every second group of four was stopped by two replies. It is planned with groups of three."""
    pool = (
        sampled("trained", 1, 1, 0, 0), sampled("dropped:stopped", 0, 0), sampled("dropped:zero_advantage", 1, 1, 1, 1)
    )  # fmt: skip
    whole = {"selection": {"first_replies": None}}
    assert set(drawn(groups_of(config_of(), *pool), config_of(group_size=3))) == {(3, True), (2, False), (3, False)}
    sizes = set(drawn(groups_of(config_of(**whole), pool[0], pool[2]), config_of(group_size=3)))
    assert sizes == {(3, True), (2, False)}
    sizes = set(drawn(groups_of(config_of(), pool[1]), config_of(**whole)))
    assert sizes == {(4, True), (4, False)}  # further replies might have passed


def test_of_a_group_of_another_size_it_is_drawn_whether_its_rewards_are_equal():
    whole = {"selection": {"first_replies": None}}
    half = groups_of(config_of(**whole), sampled("trained", 1, 1, 0, 0))
    kept = [is_kept for _, is_kept in drawn(half, config_of(group_size=2, **whole), 3000)]
    assert sum(kept) / 3000 == pytest.approx(2 / 3, abs=0.05)  # 2 of 4 replies, without replacement
    none = groups_of(config_of(**whole), sampled("dropped:zero_advantage", 0, 0, 0, 0))
    kept = [is_kept for _, is_kept in drawn(none, config_of(group_size=8, **whole), 3000)]
    # With a uniform prior the pass rate has the posterior Beta(1, 5): all of 4 more fail with the chance 5 / 9.
    assert sum(kept) / 3000 == pytest.approx(4 / 9, abs=0.05)
    assert not any(is_kept for _, is_kept in drawn(none, config_of(group_size=2, **whole)))
    other = groups_of(config_of(**whole), sampled("dropped:truncated", 1, 0, 1, 0))
    assert not any(is_kept for _, is_kept in drawn(other, config_of(**whole)))
    assert all(is_kept for _, is_kept in drawn(none, config_of(drop_zero_advantage=False, **whole)))


def test_a_calibration_on_too_little_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = recorded_run(tmp_path, steps=4)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("device: h100\nmodel: llama4-scout\n")
    assert main(["plan", "scale/scout-8/rl", "--cluster", str(cluster), "--calibrate", str(run)]) == 2
    assert "needs 7 steps with `train_cpu_s`" in capsys.readouterr().err
    assert main(["plan", "scale/scout-8/rl", "--cluster", str(cluster), "--calibrate", str(tmp_path / "none")]) == 2
    assert "has no RL stage with metrics" in capsys.readouterr().err


# --- a number of engines from a range ---


def elastic_config(groups_per_step: int = 4, **workers):
    """A stage whose engines are as dear as its trainer."""
    data = {
        "model": {"path": "policy"}, "prompts": {"path": "prompts.jsonl"}, "reward": {"name": "math"},
        "resources": {"rollout": {"workers": workers}}, "groups_per_step": groups_per_step, "group_size": 2,
        "max_staleness": 2,
    }  # fmt: skip
    return validate_config(RlConfig, data, "rl.yaml")


def made(train_s: float, most: int = 99):
    """Settings with any number of engines up to `most`."""

    def make(number: int) -> Setting:
        if number > most:
            raise ConfigError("--cluster", ["too many"])
        return setting(
            costs=Costs(EngineCosts(0.01, 0.0), TrainerCosts(train_s, 0.0), UpdateCosts(0.0, 0.0)), engines=number,
            draw=equal_lengths(100), max_seqs=4, groups_per_step=4, max_staleness=3,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("train_s", "most", "range_of", "workers", "why"),
    [
        # An engine samples the 4 groups of a step in 4 seconds, one after the other.
        (1.0, 99, (1, 8), 4, "the trainer hardly waits"),
        (4.5, 99, (1, 8), 1, "with 1 the trainer hardly waits"),
        (0.01, 99, (1, 3), 3, "3 are the most that there may be"),
        (0.01, 2, (1, 8), 2, "there is no room for 3"),
    ],
)
def test_engines_are_taken_until_the_next_is_not_worth_its_cost(train_s, most, range_of, workers, why):
    config = elastic_config(min=range_of[0], max=range_of[1])
    choice = choose_engines(config, *range_of, make=made(train_s, most))
    assert choice.workers == workers
    assert why in choice.reason
    times = [item.step_s for item in choice.tried]
    assert times == sorted(times, reverse=True)
    assert [item.workers for item in choice.tried] == list(range(1, len(times) + 1))


def test_a_range_of_which_the_fewest_do_not_fit_is_refused():
    with pytest.raises(ConfigError, match="too many"):
        choose_engines(elastic_config(min=3, max=8), 3, 8, make=made(1.0, most=2))


def test_of_a_wide_range_some_numbers_are_tried():
    choice = choose_engines(elastic_config(min=1, max=40), 1, 40, make=made(1e-4))
    assert len(choice.tried) < 20
    steps = [(one.workers, other.workers) for one, other in itertools.pairwise(choice.tried)]
    assert all(one < other <= max(one + 1, 1.2 * one) for one, other in steps)


@pytest.mark.parametrize(("slowdown", "workers"), [(1.5, [2]), (1.0, range(4, 9))])
def test_a_number_is_chosen_from_what_the_first_steps_of_a_run_have_shown(slowdown, workers, tmp_path: Path):
    """One engine is too slow. Others help as far as there are cores: the run may have shown that there are 4 / 3."""
    run = recorded_run(tmp_path, slowdown=slowdown)
    config = elastic_config(min=1, max=8, forecast=True, groups_per_step=64)
    choice = choose_for_run(config, run / "rl", 8, cpus=64.0)
    assert '"engine_token_s"' in choice.costs
    assert choice.tried[0].waits > 0.5
    assert choice.workers in workers


# --- the command ---


def test_the_command_forecasts_both_ways_of_a_stage(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "scale/scout-8/rl", "groups_per_step=8", "--cluster", "scale/scout-8/cluster", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asynchronous"]["devices"] == 8
    assert found["speedup"] == pytest.approx(found["in_turns"]["step_s"] / found["asynchronous"]["step_s"])
    assert found["asynchronous"]["staleness"] <= 4
    assert all(0 <= share <= 1 for way in ("asynchronous", "in_turns") for share in found[way]["idle"].values())


@pytest.mark.slow  # seconds of simulation
def test_the_page_of_forecasts_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    command = "plan scale/scout-8/rl --cluster scale/scout-8/cluster"
    assert main(command.split()) == 0
    assert f"```\n$ posttrain {command}\n{capsys.readouterr().out.rstrip()}\n```" in page


@pytest.mark.parametrize(
    ("part", "costs"),
    [
        ("engines", Costs(EngineCosts(0.1, 0.0), TrainerCosts(0.1, 0.0), NO_UPDATE)),
        ("trainer", Costs(EngineCosts(0.001, 0.0), TrainerCosts(9.0, 0.0), NO_UPDATE)),
        ("weight updates", Costs(EngineCosts(0.001, 0.0), TrainerCosts(0.1, 0.0), UpdateCosts(9.0, 0.0))),
        ("rewards", Costs(EngineCosts(0.001, 0.0), TrainerCosts(0.1, 0.0), NO_UPDATE, reward_s=2.0)),
    ],
)
def test_the_part_that_would_help_most_in_half_the_time_is_the_bottleneck(part, costs):
    planned: Any = SimpleNamespace(setting=setting(costs=costs, max_staleness=2, reward_workers=1))
    found = find_bottleneck(planned, simulate(planned.setting))
    assert found.part == part
    assert found.gain == pytest.approx(2.0, rel=0.2)


def test_the_drawing_shows_how_much_of_each_stretch_an_actor_worked():
    from posttrain.forecast.text import SHADES, WIDTH, draw

    begun = [SimpleNamespace(began=float(number)) for number in (0, 36, 72, 108, 144)]
    busy = {"engine-0": [(0.0, 72.0)], "engine-1": [(0.0, 36.0)], "trainer": [(142.0, 144.0)]}
    way: Any = SimpleNamespace(
        outcome=SimpleNamespace(trace=SimpleNamespace(steps=begun, busy=busy)), planned=SimpleNamespace(name="so")
    )
    head, engine, trainer = draw(way)
    assert head.startswith("4 steps, so, 144.0 s")
    half = SHADES[round(0.5 * (len(SHADES) - 1))]  # a stretch is 2 s; one engine of two works in the second quarter
    assert engine == f"  engine  |{SHADES[-1] * (WIDTH // 4)}{half * (WIDTH // 4)}{' ' * (WIDTH // 2)}|"
    assert trainer == f"  trainer |{' ' * (WIDTH - 1)}{SHADES[-1]}|"


def test_the_changes_that_help_are_those_of_what_is_slow():
    """The engines limit a run: more of them help, and are named first; each gain is that of a simulation."""
    from posttrain.forecast.changes import NUM_SHOWN, best_changes

    base = elastic_config(min=1, max=2)
    config = with_engines(base, 1)

    def make(changed: RlConfig) -> Any:
        return SimpleNamespace(setting=made(0.5)(changed.resources.rollout.most), memory=[])

    now = simulate(make(config).setting)
    found = best_changes(config, make, now)
    assert 0 < len(found) <= NUM_SHOWN
    assert found == sorted(found, key=lambda change: -change.gain)
    more = next(change for change in found if change.text == "resources.rollout.workers: 2")
    assert more.gain == pytest.approx(now.step_s / simulate(made(0.5)(2)).step_s)
    assert more.gain > 1.5
    assert more.devices == 1


def test_the_command_shows_a_range_of_engines_number_by_number(capsys: pytest.CaptureFixture[str]):
    command = ["plan", "scale/scout-8/rl", "resources.rollout.workers={min: 1, max: 9}", "groups_per_step=8"]
    assert main([*command, "--cluster", "scale/scout-8/cluster"]) == 0
    text = capsys.readouterr().out
    assert "there is no room for" in text or "is worth its cost" in text or "hardly waits" in text
    rows = re.findall(r"^(\d+) +([\d.]+) +(\d+)%(  <-)?$", text, re.M)
    [chosen] = [int(number) for number, _, _, mark in rows if mark]
    assert f"What follows is for {chosen}." in text
    assert main([*command, "--cluster", "scale/scout-8/cluster", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"]["workers"] == chosen
    [same] = [item["step_s"] for item in found["engines"]["tried"] if item["workers"] == chosen]
    assert found["asynchronous"]["step_s"] == same


@pytest.mark.parametrize(
    ("file", "cluster", "message"),
    [
        ("scale/scout-8/rl", "device: h300\n", "got 'h300'; give one of b200, h100, h200, cpu"),
        ("scale/scout-8/rl", "device: h200\ndevices_per_host: 4\nmodel: llama4-scout\n", "asks for 8 devices"),
        ("configs/rl.yaml", "device: h200\n", "model: got 'my-model': no such file or folder"),
        ("scale/scout-8/rl", "device: h200\nhots: 2\n", "hots"),
        ("configs/sft.yaml", "device: h200\n", "a forecast is made of one stage of kind rl"),
    ],
)
def test_bad_input_is_named(file, cluster, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster)
    assert main(["plan", file, "--cluster", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_calibrate_needs_a_cluster(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama4-scout", "--calibrate", "runs/mine"]) == 2
    assert "needs --cluster FILE" in capsys.readouterr().err


def test_a_cluster_counts_its_devices():
    assert ClusterConfig(device="h200", hosts=3, devices_per_host=8).devices == 24
