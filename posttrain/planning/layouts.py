"""The memory that a layout needs on each GPU, and which layouts fit."""

from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.config.training import ParallelConfig
from posttrain.errors import ConfigError
from posttrain.parallel.engine import lora_problems
from posttrain.planning.activations import kv_bytes, peak_bytes
from posttrain.planning.config import PlanConfig
from posttrain.planning.memory import State, state_bytes
from posttrain.planning.sizes import Sizes

MOST_GPUS = 1 << 16


@dataclass(frozen=True, slots=True)
class Need:
    """The bytes that one GPU needs in a layout. activations: None for a model whose activations are unknown."""

    parallel: ParallelConfig
    state: State
    activations: int | None
    kv: int

    @property
    def total(self) -> int:
        """The largest number of bytes in use at one time."""
        return self.state.total(self.activations or 0) + self.kv


def need(sizes: Sizes, plan: PlanConfig, parallel: ParallelConfig | None = None) -> Need:
    """The memory of one GPU in the layout `parallel`, by default that of the plan.

    Raises ConfigError if the layout's `expert` does not fit the model.
    """
    parallel = parallel or plan.parallel
    experts = sizes.config.num_local_experts if sizes.experts else 1
    if experts % parallel.expert:
        raise ConfigError("parallel.expert", [f"got {parallel.expert}; it must divide the model's experts ({experts})"])
    largest = max(sizes.largest // parallel.expert, sizes.parts.get("embeddings", 0))
    state = state_bytes(
        sizes.total, sizes.experts, parallel, dtype=plan.dtype, adapters=sizes.adapters, largest=largest
    )
    activations = None
    if sizes.native:
        activations = peak_bytes(sizes.config, plan.tokens, plan.dtype, checkpointing=plan.gradient_checkpointing)
    kv = kv_bytes(sizes.config, plan.kv_sequences, plan.kv_length, dtype=plan.dtype) if sizes.native else 0
    return Need(parallel, state, activations, kv)


def layouts(sizes: Sizes, gpus: int, plan: PlanConfig) -> Iterator[ParallelConfig]:
    """Every combination of a ZeRO stage and an expert size that divides both the GPUs and the experts.

    With adapters, those are left out in which they cannot be trained.
    """
    experts = sizes.config.num_local_experts if sizes.experts else 1
    for zero in (0, 1, 2, 3):
        for expert in range(1, min(experts, gpus) + 1):
            if gpus % expert == 0 and experts % expert == 0:
                kept = plan.parallel.offload if zero else "none"
                layout = {"processes": gpus, "expert": expert, "zero": zero, "offload": kept}
                found = ParallelConfig.model_validate(layout)
                if plan.lora is None or not lora_problems(found, plan.lora):
                    yield found


def fits(needed: Need, plan: PlanConfig, gpu_gib: float) -> bool:
    """True if a GPU with `gpu_gib` GiB has room for it, with the plan's reserve left free."""
    return needed.total <= gpu_gib * (1 - plan.reserve) * 2**30


def fewest(sizes: Sizes, plan: PlanConfig, gpu_gib: float) -> Need | None:
    """The layout that needs the fewest GPUs (a power of two); None if even a very large number is not enough."""
    gpus = 1
    while gpus <= MOST_GPUS:
        found = [need(sizes, plan, layout) for layout in layouts(sizes, gpus, plan)]
        best = min(found, key=lambda item: item.total)
        if fits(best, plan, gpu_gib):
            return best
        gpus *= 2
    return None
