"""Puts a forecast together: both ways to run a stage, what limits the first, and what would help."""

from dataclasses import dataclass

from posttrain.forecast.calibration import Calibration
from posttrain.forecast.changes import Change, best_changes
from posttrain.forecast.config import ClusterConfig, DeviceConfig
from posttrain.forecast.engines import choose_engines
from posttrain.forecast.outcome import Bottleneck, Outcome, find_bottleneck, simulate
from posttrain.forecast.setting import Models, Planned, plan_asynchronous, plan_stacked
from posttrain.forecast.simulation import Setting
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.scaling import Choice


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a stage, and its outcome."""

    planned: Planned
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Forecast:
    """steps: of the stage. price: of one device for an hour. choice: of a number of engines, if the stage has a range
    of them; everything else holds for that number.
    """

    asynchronous: Way
    in_turns: Way
    bottleneck: Bottleneck
    changes: list[Change]
    steps: int
    price: float
    choice: Choice | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast a step is as in turns, on the same devices."""
        return self.in_turns.outcome.step_s / self.asynchronous.outcome.step_s

    def hours(self, way: Way) -> float:
        """Hours of one device times the number of devices, for all steps of the stage."""
        return way.planned.devices * way.outcome.step_s * self.steps / 3600


def make_forecast(
    config: RlConfig,
    cluster: ClusterConfig,
    device: DeviceConfig,
    *,
    models: Models,
    calibration: Calibration | None = None,
    with_changes: bool = True,
) -> Forecast:
    """Simulate a stage on a cluster. calibration: a run whose costs and replies replace those of cluster and device.

    Raises ConfigError if the stage asks for more devices than there are; with a range of engines, for its fewest.
    """
    choice = None
    if config.resources.rollout.is_elastic:
        choice = _chosen(config, cluster, device, models=models, calibration=calibration)
        config = with_engines(config, choice.workers)

    def calibrated(planned: Planned, changed: RlConfig) -> Planned:
        return planned if calibration is None else calibration.apply(planned, changed)

    def plan(changed: RlConfig) -> Planned:
        wide = cluster.model_copy(update={"hosts": 2 * cluster.hosts})  # a change may ask for more devices
        planned = plan_asynchronous(changed, cluster if changed is config else wide, device, models=models)
        return calibrated(planned, changed)

    planned = plan(config)
    outcome = simulate(planned.setting)
    spread = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"processes": planned.devices, "expert": 1})}
    )
    stacked = calibrated(plan_stacked(config, cluster, device, models=models), spread)
    return Forecast(
        Way(planned, outcome),
        Way(stacked, simulate(stacked.setting)),
        find_bottleneck(planned, outcome),
        best_changes(config, plan, outcome) if with_changes else [],
        config.steps,
        device.price_per_hour if cluster.price_per_hour is None else cluster.price_per_hour,
        choice,
    )


def _chosen(
    config: RlConfig,
    cluster: ClusterConfig,
    device: DeviceConfig,
    *,
    models: Models,
    calibration: Calibration | None,
) -> Choice:
    """The number of engines at which a stage with a range of them is expected to stay."""

    def make(number: int) -> Setting:
        changed = with_engines(config, number)
        planned = plan_asynchronous(changed, cluster, device, models=models)
        return (planned if calibration is None else calibration.apply(planned, changed)).setting

    return choose_engines(config, config.resources.rollout.least, config.resources.rollout.most, make=make)


def with_engines(config: RlConfig, number: int) -> RlConfig:
    """The stage with a fixed number of engines."""
    rollout = config.resources.rollout.model_copy(update={"workers": number})
    return config.model_copy(update={"resources": config.resources.model_copy(update={"rollout": rollout})})
