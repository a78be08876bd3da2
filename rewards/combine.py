"""Rewards that combine other rewards: a weighted sum, a reward for each capability, and a verifier for each system
instruction.

Only plain functions can be combined. An async reward needs a pool of its own.
"""

import functools
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from posttrain.errors import PluginError
from posttrain.records import RewardResult, Rollout, Row
from posttrain.scoring.plugins.lookup import RewardSpec, combined_rewards, resolve
from posttrain.scoring.plugins.results import to_result
from posttrain.scoring.plugins.target import RewardFunction, import_target, warm

_ANY = "default"


def weighted_sum(rollout: Rollout, row: Row, rewards: Mapping[str, Any]) -> RewardResult:
    """The sum of several rewards times their weights. The parts of the result are the weighted rewards by name.

    rewards: name -> weight, or name -> {weight, args}. An exception in one of them leaves the rollout unscored.
    """
    parts, reasons = {}, []
    for name, value in rewards.items():
        weight, args = (value["weight"], value.get("args")) if isinstance(value, Mapping) else (value, None)
        result = _call(name, args, rollout, row=row)
        parts[name] = result.value * float(weight)
        reasons += [f"{name}: {result.reason}"] if result.reason else []
    return RewardResult(sum(parts.values()), parts, "; ".join(reasons))


def by_capability(rollout: Rollout, row: Row, rewards: Mapping[str, Any]) -> RewardResult:
    """The reward named for the row's capability, else the one named `default`.

    rewards: capability -> name, or capability -> {name, args}. Raises ValueError for a capability without a reward.
    """
    choice = rewards.get(row.capability, rewards.get(_ANY))
    if choice is None:
        raise ValueError(f"row {row.id}: no reward for capability {row.capability!r}; there are {', '.join(rewards)}")
    spec = RewardSpec.of(choice)
    return _call(spec.name, spec.args, rollout, row=row)


def by_system(
    rollout: Rollout, row: Row, reward: str | Mapping[str, Any], *, verifiers: Mapping[str, Any]
) -> RewardResult:
    """(1 - w) R + w V, with R the reward of the task and V that of the verifier of the sampled system instruction.

    reward: name, or {name, args}. verifiers: text of a system instruction -> {name, args, weight}, where weight is w.
    The parts are `task` (R) and `system` (V), unweighted, and their own parts as `task.NAME` and `system.NAME`. Without
    a system instruction, or with one that has no verifier, the result is the reward of the task alone.
    """
    task = _call_spec(RewardSpec.of(reward), rollout, row)
    choice = verifiers.get(rollout.system) if rollout.system is not None else None
    if choice is None:
        return task
    verifier = RewardSpec.of({name: value for name, value in choice.items() if name != "weight"})
    system, weight = _call_spec(verifier, rollout, row), float(choice["weight"])
    parts, reasons = {}, []
    for name, result in (("task", task), ("system", system)):
        parts |= {name: result.value, **{f"{name}.{part}": value for part, value in result.parts.items()}}
        reasons.append(f"{name} {result.value:g}" + (f" ({result.reason})" if result.reason else ""))
    return RewardResult((1 - weight) * task.value + weight * system.value, parts, "; ".join(reasons))


def warm_up(**args: Any) -> None:
    """Load and warm up the rewards that these arguments name, so that their slow imports do not count against a
    deadline.
    """
    for spec in combined_rewards(args):
        warm(_load(spec.name)[0], spec.args)


def _call_spec(spec: RewardSpec, rollout: Rollout, row: Row) -> RewardResult:
    return _call(spec.name, spec.args, rollout, row=row)


def _call(name: str, args: Mapping[str, Any] | None, rollout: Rollout, *, row: Row) -> RewardResult:
    try:
        return to_result(_load(name)[1](rollout, row, **(args or {})))
    except PluginError as error:
        raise PluginError(f"{error} (reward {name!r})") from error


@functools.cache
def _load(name: str) -> tuple[ModuleType, RewardFunction]:
    module, function = import_target(resolve(name))
    if inspect.iscoroutinefunction(function):
        raise PluginError(f"reward {name!r} is async; it cannot be part of another reward")
    return module, function
