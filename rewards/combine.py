"""Rewards made of other rewards: a weighted sum, and another reward for each capability. Plain functions only:
an async reward belongs in a pool of its own."""

import functools
import inspect
import numbers
from collections.abc import Mapping
from typing import Any

from posttrain.errors import PluginError
from posttrain.records import RewardResult, Rollout, Row
from posttrain.scoring.plugins import RewardSpec, resolve
from posttrain.scoring.target import RewardFunction, import_target

_ANY = "default"


def weighted_sum(rollout: Rollout, row: Row, rewards: Mapping[str, Any]) -> RewardResult:
    """The sum of several rewards times their weights; each is a part of the result.

    rewards: name -> weight, or name -> {weight, args}. An exception in one of them leaves the rollout unscored.
    """
    parts, reasons = {}, []
    for name, value in rewards.items():
        weight, args = (value["weight"], value.get("args")) if isinstance(value, Mapping) else (value, None)
        result = _call(name, args, rollout, row)
        parts[name] = result.value * float(weight)
        reasons += [f"{name}: {result.reason}"] if result.reason else []
    return RewardResult(sum(parts.values()), parts, "; ".join(reasons))


def by_capability(rollout: Rollout, row: Row, rewards: Mapping[str, Any]) -> RewardResult:
    """The reward that is named for the row's capability, or the one under `default`.

    rewards: capability -> name, or capability -> {name, args}. Raises ValueError for a capability without a reward.
    """
    choice = rewards.get(row.capability, rewards.get(_ANY))
    if choice is None:
        raise ValueError(f"row {row.id}: no reward for capability {row.capability!r}; there are {', '.join(rewards)}")
    spec = RewardSpec.of(choice)
    return _call(spec.name, spec.args, rollout, row)


def _call(name: str, args: Mapping[str, Any] | None, rollout: Rollout, row: Row) -> RewardResult:
    value = _load(name)(rollout, row, **(args or {}))
    if isinstance(value, numbers.Real):
        return RewardResult(float(value))
    if not isinstance(value, RewardResult):
        raise TypeError(f"reward {name!r} returned a {type(value).__name__}; it must return a float or a RewardResult")
    return value


@functools.cache
def _load(name: str) -> RewardFunction:
    function = import_target(resolve(name))[1]
    if inspect.iscoroutinefunction(function):
        raise PluginError(f"reward {name!r} is async; it cannot be part of another reward")
    return function
