"""What lies in the memory of a device: of the trainer's, of an engine's, and of one that holds every model."""

from dataclasses import dataclass

from posttrain.config.training import ParallelConfig
from posttrain.planning.activations import kv_bytes
from posttrain.planning.config import PlanConfig
from posttrain.planning.layouts import need
from posttrain.planning.memory import BYTES
from posttrain.planning.sizes import Sizes
from posttrain.rl.config import RlConfig

GIB = 1 << 30
RESERVE = 0.1  # of a device, for what is not counted, as in `posttrain plan`


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes by part on one device of a role, without the KV cache. room: what is left for it. moved: bytes that would
    leave the device while engines sample; only where models take turns.
    """

    role: str
    parts: dict[str, int]
    room: int
    moved: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the parts have room."""
        return self.room >= 0


def usable(memory_gib: float) -> int:
    """Bytes of a device that may be planned with."""
    return int(memory_gib * (1 - RESERVE) * GIB)


def trainer_memory(sizes: Sizes, config: RlConfig, parallel: ParallelConfig, *, memory_gib: float) -> DeviceMemory:
    """The memory of one device of the trainer."""
    plan = PlanConfig(
        parallel=parallel,
        dtype=config.model.dtype,
        lora=config.lora,
        tokens=config.micro_batch_tokens,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    found = need(sizes, plan)
    state = found.state
    backward = state.gradients + state.buffers + (found.activations or 0)
    parts = {"weights": state.weights, "optimizer": state.optimizer}
    parts |= {"backward": backward} if backward >= state.step else {"step": state.step}
    return DeviceMemory("trainer", parts, usable(memory_gib) - sum(parts.values()), state.weights + state.optimizer)


def engine_memory(role: str, sizes: Sizes, dtype: str, *, devices: int, memory_gib: float) -> DeviceMemory:
    """The memory of one of the `devices` devices of an engine."""
    weights = BYTES[dtype] * sizes.total // devices
    return DeviceMemory(role, {"weights": weights}, usable(memory_gib) - weights)


def stacked_memory(trainer: DeviceMemory, served: list[DeviceMemory], *, memory_gib: float) -> DeviceMemory:
    """The memory of a device that holds every model. Activations are freed before engines sample."""
    parts = {"trainer": trainer.moved} | {item.role: item.total for item in served}
    room = usable(memory_gib) - sum(parts.values())
    return DeviceMemory("every model", parts, room, trainer.moved)


def sequences_in(room: int, sizes: Sizes, dtype: str, *, devices: int, length: int) -> int:
    """How many sequences of `length` tokens have their KV cache in `room` bytes of each device of an engine."""
    if room <= 0:
        return 0
    each = kv_bytes(sizes.config, 1, length, dtype=dtype) if sizes.native else 0
    return room * devices // each if each else 1 << 20
