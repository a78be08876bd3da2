"""Which changes of a stage's config would make its steps faster: each is simulated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.forecast.outcome import Outcome, simulate
from posttrain.forecast.setting import Planned, device_counts, per_engine
from posttrain.rl.config import RlConfig

NUM_SHOWN = 3
LEAST_GAIN = 1.02


@dataclass(frozen=True, slots=True)
class Change:
    """text: the keys to set. gain: how many times as fast a step gets. devices: more of them, or fewer. cost: of a
    step, divided by what it costs now.
    """

    text: str
    gain: float
    devices: int
    cost: float


def best_changes(config: RlConfig, make: Callable[[RlConfig], Planned], now: Outcome) -> list[Change]:
    """The changes that help most, the best first. make: plans a config. now: the outcome of `config`."""
    found: list[Change] = []
    used = sum(device_counts(config).values())
    for text, changed in _candidates(config):
        try:
            planned = make(changed)
        except ConfigError:  # for example a number of ranks that the experts cannot be divided over
            continue
        if not all(item.fits for item in planned.memory):
            continue
        gain = now.step_s / simulate(planned.setting).step_s
        devices = sum(device_counts(changed).values())
        if gain >= LEAST_GAIN:
            found.append(Change(text, gain, devices - used, devices / used / gain))
    return sorted(found, key=lambda change: -change.gain)[:NUM_SHOWN]


def _candidates(config: RlConfig) -> Iterator[tuple[str, RlConfig]]:
    """Configs that differ in one decision, each with the keys to set."""
    rollout, ranks, split = config.resources.rollout, config.parallel.processes, per_engine(config)
    more = max(1, rollout.most // 4)
    yield from _changed(config, {"resources.rollout.workers": rollout.most + more})
    yield from _changed(config, {"parallel.processes": 2 * ranks})
    if ranks % 2 == 0 and ranks // 2 >= split:
        workers = rollout.most + ranks // 2 // split
        fewer: dict[str, object] = {"parallel.processes": ranks // 2, "resources.rollout.workers": workers}
        if config.parallel.expert > ranks // 2:
            fewer["parallel.expert"] = ranks // 2
        yield from _changed(config, fewer)
    if rollout.most * split > ranks:
        workers = rollout.most - -(-ranks // split)
        if workers >= 1:
            yield from _changed(config, {"resources.rollout.workers": workers, "parallel.processes": 2 * ranks})
    yield from _changed(config, {"max_staleness": config.max_staleness + 1})
    yield from _changed(config, {"max_staleness": 2 * config.max_staleness + 2})
    yield from _changed(config, {"engine.max_num_seqs": 2 * config.engine.max_num_seqs})
    yield from _changed(config, {"reward.workers": 2 * config.reward.workers})
    if config.resources.judge is not None:
        yield from _changed(config, {"resources.judge.workers": config.resources.judge.workers + 1})
    if config.weights.kv == "recompute":
        yield from _changed(config, {"weights.kv": "keep"})


def _changed(config: RlConfig, values: dict[str, object]) -> Iterator[tuple[str, RlConfig]]:
    data = config.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    try:
        yield ", ".join(f"{key}: {value}" for key, value in values.items()), RlConfig.model_validate(data)
    except ValueError:  # keys that do not go together
        return
