"""How long each kind of work takes, in seconds. Where the figures come from: hardware.py and calibration.py."""

from dataclasses import dataclass, fields, replace
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """One step of an engine gives every running sequence a token. With c sequences and k tokens of context it takes

        step_s + max(dense_s + experts_s * (1 - idle_expert ** c), c * token_s) + k * context_s

    step_s: independent of model and batch. dense_s: reads all weights but the routed experts. experts_s: reads all
    routed experts. idle_expert: the probability that one token needs none of an expert's weights. token_s: computes one
    token. context_s: reads one token of the KV cache. prefill_s: computes one token of a prompt.
    """

    step_s: float
    token_s: float
    prefill_s: float = 0.0
    dense_s: float = 0.0
    experts_s: float = 0.0
    idle_expert: float = 0.0
    context_s: float = 0.0

    def decode_s(self, running: int) -> float:
        """Seconds of one step with so many sequences, without their context."""
        read_s = self.dense_s + self.experts_s * (1 - self.idle_expert**running)
        return self.step_s + max(read_s, running * self.token_s)


@dataclass(frozen=True, slots=True)
class TrainerCosts:
    """An optimizer step on n tokens takes fixed_s + n * token_s. The prompt of a group counts once."""

    fixed_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class UpdateCosts:
    """From a step to new weights in the engines. pull_s: until they are at each host, while the engines sample.
    pause_s: the engines are stopped. recomputes: whether they compute the KV cache of unfinished replies again, the
    prompt once for a group.
    """

    pull_s: float
    pause_s: float
    recomputes: bool = True


@dataclass(frozen=True, slots=True)
class Costs:
    """All costs of a run. judge: None without one. reward_s, reference_s: for a group. cores: how many processes can
    work at full speed at the same time, where engines and trainer share the cores of a CPU; None: each has its own.

    Example: `Costs(EngineCosts(2e-3, 1e-4), TrainerCosts(0.2, 1e-4), UpdateCosts(0.0, 0.02), reward_s=0.05)`.
    """

    engine: EngineCosts
    trainer: TrainerCosts
    update: UpdateCosts
    reward_s: float = 0.0
    reference_s: float = 0.0
    judge: EngineCosts | None = None
    cores: float | None = None


CostsT = TypeVar("CostsT", bound=EngineCosts | TrainerCosts | UpdateCosts | Costs)


def scaled(costs: CostsT, factor: float) -> CostsT:
    """So many times the seconds of a record of costs, and of the records in it. Fields that end in _s hold seconds."""
    values = {item.name: getattr(costs, item.name) for item in fields(costs)}
    changed = {name: factor * value for name, value in values.items() if name.endswith("_s")}
    inner = {
        name: scaled(v, factor) for name, v in values.items() if isinstance(v, (EngineCosts, TrainerCosts, UpdateCosts))
    }
    return replace(costs, **changed, **inner)
