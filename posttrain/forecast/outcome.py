"""What a simulation comes to: rates, idle shares, and what the time goes to."""

from dataclasses import dataclass, replace
from statistics import fmean

from posttrain.forecast.costs import scaled
from posttrain.forecast.setting import Planned
from posttrain.forecast.simulation import Setting, Simulation, Trace

STEPS = 30
WARM_UP = 1 / 3  # of the steps, in which queue and staleness are not yet what they will be
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the steps after the warm-up. step_s: seconds of an optimizer step. tokens_per_s: sampled by engines,
    trained on, sampled by the judge. idle: shares of the time, of each kind of actor. waited_s: for a batch.
    """

    step_s: float
    tokens_per_s: dict[str, float]
    idle: dict[str, float]
    staleness: float
    queue: float
    waited_s: float
    trace: Trace


def simulate(setting: Setting, *, steps: int = STEPS, seed: int = 0) -> Outcome:
    """Simulate a setting."""
    return _outcome(Simulation(setting, seed).run(steps))


def _outcome(trace: Trace) -> Outcome:
    first = max(1, int(len(trace.steps) * WARM_UP))
    kept = trace.steps[first:]
    start, end = trace.steps[first].began, trace.steps[-1].began
    wall_s = end - start
    kinds: dict[str, list[str]] = {}
    for name in trace.busy:
        kinds.setdefault({"engine": "engines", "judge": "judge"}.get(name.split("-")[0], name), []).append(name)
    idle = {
        kind: 1 - fmean(_within(trace.busy[name], start, end) for name in names) / wall_s
        for kind, names in kinds.items()
    }
    rates = {
        "engines": sum(trace.sampled.values()) / trace.end,
        "trainer": sum(step.tokens for step in kept[:-1]) / wall_s,
    }
    if "judge" in kinds:
        rates["judge"] = trace.judged / trace.end
    return Outcome(
        wall_s / (len(kept) - 1),
        rates,
        {kind: max(0.0, share) for kind, share in idle.items()},
        fmean(step.staleness for step in kept),
        fmean(step.queue for step in kept),
        fmean(step.waited_s for step in kept),
        trace,
    )


def _within(intervals: list[tuple[float, float]], start: float, end: float) -> float:
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in intervals)


# --- the bottleneck ---


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The part whose work, were it done in half the time, would make steps fastest. gain: how many times as fast."""

    part: str
    gain: float


def find_bottleneck(planned: Planned, outcome: Outcome) -> Bottleneck:
    """The part of the run that decides how long a step takes."""
    setting, costs = planned.setting, planned.setting.costs
    engine, trainer, update = costs.engine, costs.trainer, costs.update
    parts = {
        "engines": replace(setting, costs=replace(costs, engine=scaled(engine, HALF))),
        "trainer": replace(setting, costs=replace(costs, trainer=scaled(trainer, HALF))),
        "weight updates": replace(setting, costs=replace(costs, update=scaled(update, HALF))),
        "rewards": replace(
            setting, costs=replace(costs, reward_s=HALF * costs.reward_s, reference_s=HALF * costs.reference_s)
        ),
        "the bound on staleness": replace(setting, max_staleness=2 * setting.max_staleness + 2),
    }
    gains = {part: outcome.step_s / simulate(changed).step_s for part, changed in parts.items()}
    best = max(gains, key=lambda part: gains[part])
    return Bottleneck(best, gains[best])
