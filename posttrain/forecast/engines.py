"""How many engines a stage should have, where `resources.rollout.workers` is a range: each number is simulated.

From the fewest engines on, a larger number is taken if its steps are so much faster that it is worth its cost, by the
rule that a running stage follows too (rl/loop/scaling.py). No larger number is tried once the trainer hardly waits,
because engines cannot make steps faster then. Of wide ranges some numbers are tried, each at least a fifth larger than
the one before it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.forecast.calibration import calibrate, describe
from posttrain.forecast.config import WorkloadConfig
from posttrain.forecast.outcome import simulate
from posttrain.forecast.setting import make_setting
from posttrain.forecast.simulation import Setting
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.scaling import NO_WAIT, Choice, Tried, role_costs, worth

GROWTH = 1.2


def choose_engines(config: RlConfig, least: int, most: int, *, make: Callable[[int], Setting]) -> Choice:
    """Choose from `least` to `most` engines. make: the setting with so many engines; raises ConfigError if there is no
    room for them, unless they are `least`.
    """
    engine_cost, other_cost = role_costs(config)
    tried: list[Tried] = []
    chosen: Tried | None = None
    why = f"{most} are the most that there may be"
    for number in _numbers(least, most):
        try:
            setting = make(number)
        except ConfigError:
            if chosen is None:
                raise
            why = f"there is no room for {number}"
            break
        outcome = simulate(setting)
        now = Tried(number, outcome.step_s, min(1.0, outcome.waited_s / outcome.step_s))
        tried.append(now)
        if chosen is None or chosen.step_s / now.step_s >= worth(
            other_cost + chosen.workers * engine_cost, other_cost + number * engine_cost
        ):
            chosen = now
        if now.waits <= NO_WAIT:
            why = f"with {number} the trainer hardly waits"
            break
    assert chosen is not None
    better = f"no larger number is worth its cost, and {why}" if chosen is not tried[-1] else why
    return Choice(
        chosen.workers,
        tuple(tried),
        f"a step is forecast to take {chosen.step_s:.3g} s if the number of engines is {chosen.workers}, and the "
        f"trainer to wait {chosen.waits:.0%} of it; {better}",
    )


def _numbers(least: int, most: int) -> Iterator[int]:
    number = least
    while number < most:
        yield number
        number = max(number + 1, math.floor(GROWTH * number))
    yield most


def choose_for_run(config: RlConfig, stage: Path, most: int, *, cpus: float) -> Choice:
    """Choose the number of engines for a stage that is running, from what its first steps have shown.

    stage: its folder. most: engines that there is room for. cpus: that all actors may take together; they have them to
    themselves, unless the run has shown that they get less. Raises ConfigError or DataError if too little was recorded.
    The engines of a judge are left out: they are taken to keep up.
    """
    calibration = calibrate(stage, config=config)
    costs = calibration.costs
    if costs.cores is not None and not calibration.is_overloaded:
        calibration = replace(calibration, costs=replace(costs, cores=max(costs.cores, cpus)))

    def make(number: int) -> Setting:
        return calibration.setting(make_setting(config, WorkloadConfig(), costs, engines=number), config)

    choice = choose_engines(config, config.resources.rollout.least, most, make=make)
    return replace(choice, costs=describe(calibration))
