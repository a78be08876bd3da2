"""Read whole tensors from an engine and write them into it, whether ZeRO, expert parallelism or both divide them.

A `WholeTensor` describes one tensor, with its name and shape in a Hugging Face folder, and the parameters of this rank
that hold parts of it. Reading is collective: every rank reads the same tensors in the same order, and each gets the
whole tensor. Only one is held at a time.

Shapes: E experts of all ranks, L experts of this rank, D hidden, I expert width.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.compat.deepspeed import expert_group, is_divided, whole_shape

Read = Callable[[nn.Parameter], torch.Tensor]


@dataclass(frozen=True, slots=True)
class OwnPart:
    """This rank's part of a tensor that ranks divide along its first dimension: part `number` of `of` equal ones.

    is_first: whether this rank's is the first of several copies of it. read: the part from `read(parameter)`; local.
    """

    number: int
    of: int
    is_first: bool
    read: Callable[[Read], torch.Tensor]


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """One tensor of a model folder. name, shape, dtype: of the whole tensor.

    parameters: those of this rank that hold it or a part of it. join: `join(read)` puts the whole tensor together from
    `read(parameter)` of each of them; collective. split: the inverse, which cuts a whole tensor into a value for each
    parameter. own: this rank's part of experts that ranks divide; None for a tensor of which every rank has all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: tuple[nn.Parameter, ...]
    join: Callable[[Read], torch.Tensor]
    split: Callable[[torch.Tensor], list[torch.Tensor]]
    own: OwnPart | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor in its dtype."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def whole_tensors(model: nn.Module) -> list[WholeTensor]:
    """Every weight of a model, as a model folder holds it. What adapters add to a weight is in its value.

    Raises ValueError for adapters that do more than add a product, such as DoRA; they must have been merged before.
    """
    tensors = _tensors(model)
    layers = _adapter_layers(model) if any(".lora_" in item.name for item in tensors) else {}
    return [_with_adapters(item, layers) for item in tensors if ".lora_" not in item.name]


def sent_tensors(model: nn.Module) -> list[WholeTensor]:
    """The weights that engines need after a step: those of every block in which something is trained.

    A block is what stands on one level, such as the attention of a layer or its experts and router. Engines fuse
    weights of a block, so all or none are sent. The others are as in the folder from which engines and trainer started.
    """
    items = whole_tensors(model)
    blocks = {_block(item) for item in items if any(parameter.requires_grad for parameter in item.parameters)}
    return [item for item in items if _block(item) in blocks]


def _block(item: WholeTensor) -> str:
    return item.name.rsplit(".", 2)[0]


def adapter_tensors(model: nn.Module) -> list[WholeTensor]:
    """Every tensor of the adapters of a model."""
    return [item for item in _tensors(model) if ".lora_" in item.name]


def trained_tensors(model: nn.Module) -> list[WholeTensor]:
    """Every tensor that the optimizer changes. Adapters are tensors of their own."""
    return [item for item in _tensors(model) if any(parameter.requires_grad for parameter in item.parameters)]


def in_shards(items: list[WholeTensor], limit: int) -> list[list[WholeTensor]]:
    """Split the list into consecutive shards of at most `limit` bytes. A larger tensor is a shard of its own."""
    shards: list[list[WholeTensor]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


def read_weights(items: list[WholeTensor]) -> Iterator[tuple[WholeTensor, torch.Tensor]]:
    """Each tensor with its whole value, in the dtype of the model. Collective."""
    for item in items:
        with torch.no_grad(), gathered(item.parameters):
            yield item, item.join(lambda parameter: parameter.detach())


def own_parts(items: list[WholeTensor], rank: int, world: int) -> Iterator[tuple[int, OwnPart, torch.Tensor]]:
    """What this rank writes so that all ranks together write every tensor once: (place in `items`, part, its value).

    Experts that ranks divide are not gathered: each rank has its own. Of the others the ranks take about as many bytes
    each. Collective, because ZeRO-3 divides every parameter: one tensor at a time is whole on all ranks.
    """
    owners, load = {}, [0] * world
    for place, item in sorted(enumerate(items), key=lambda pair: (-pair[1].num_bytes, pair[0])):
        if item.own is None:
            owners[place] = load.index(min(load))
            load[owners[place]] += item.num_bytes
    for place, item in enumerate(items):
        own = item.own or OwnPart(0, 1, owners[place] == rank, item.join)
        with torch.no_grad(), gathered(item.parameters):
            if own.is_first:
                yield place, own, own.read(lambda parameter: parameter.detach())


@contextmanager
def gathered(parameters: tuple[nn.Parameter, ...], changed: bool = False) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 divides are whole on every rank. Collective.

    changed: keep the changes that rank 0 makes to them in the block.
    """
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if changed else None):
        yield


# ------------------------------------------------------------------ the tensors of a model


def _tensors(model: nn.Module) -> list[WholeTensor]:
    divided: dict[str, Any] = {prefix: module for prefix, module in model.named_modules() if _is_divided(module)}
    experts = {id(parameter) for module in divided.values() for parameter in module.experts.parameters()}
    plain = [
        _plain(_folder_name(name), parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in experts
    ]
    return plain + [item for prefix, module in divided.items() for item in _expert_tensors(prefix, module)]


def _is_divided(module: nn.Module) -> Any:
    """True for a layer whose experts are divided among ranks by AutoEP."""
    return hasattr(module, "num_local_experts") and hasattr(module, "ep_group_name")


def _plain(name: str, parameter: nn.Parameter) -> WholeTensor:
    return WholeTensor(
        name, whole_shape(parameter), parameter.dtype, (parameter,), lambda read: read(parameter), lambda whole: [whole]
    )


def _folder_name(name: str) -> str:
    """The name in a model folder of a parameter that our wrapper, peft or AutoEP has renamed."""
    for added in ("policy.", "base_model.model."):
        name = name.removeprefix(added)
    if ".lora_" not in name:  # only this part distinguishes adapters of two weights of one module
        name = name.replace(".base_layer", "")
    return name.replace(".router.gate.weight", ".router.weight").replace(".shared_experts.", ".shared_expert.")


def adapted_weight(layer: Any) -> nn.Parameter:
    """The weight that an adapter of peft adds to: that of a linear module, or one of all experts of a layer."""
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight


def _adapter_layers(model: nn.Module) -> dict[int, Any]:
    """The layers with adapters that are not merged, by the identity of the weight that they adapt."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.merged]
    if any(layer.lora_variant for layer in layers):
        raise ValueError("adapters that do more than add a product to a weight must be merged first")
    return {id(adapted_weight(layer)): layer for layer in layers}


def _with_adapters(item: WholeTensor, layers: dict[int, Any]) -> WholeTensor:
    """The tensor with what an adapter adds to it, as peft merges it."""
    layer = layers.get(id(item.parameters[0]))
    if layer is None:
        return item
    own = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in layer.active_adapters]

    def join(read: Read) -> torch.Tensor:
        value = item.join(read)
        for name in layer.active_adapters:
            value = value + layer.get_delta_weight(name)
        return value.to(item.dtype)

    return dataclasses.replace(item, parameters=(*item.parameters, *own), join=join, own=None)


def _expert_tensors(prefix: str, layer: Any) -> list[WholeTensor]:
    """The two tensors of all experts of a layer that AutoEP divides.

    gate_up_proj [E, D, 2 I] is made of w1 (gate) and w3 (up), both [L, I, D], and down_proj [E, I, D] of w2 [L, D, I].
    """
    group, rank = expert_group(layer.ep_group_name), layer.ep_rank
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    own, width, hidden = whole_shape(w1)
    mine = slice(rank * own, (rank + 1) * own)

    def all_experts(part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(layer.ep_size)]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    def own_gate_up(read: Read) -> torch.Tensor:
        return torch.cat([read(w1), read(w3)], dim=1).transpose(1, 2)

    def join_gate_up(read: Read) -> torch.Tensor:
        return all_experts(own_gate_up(read).contiguous())

    def split_gate_up(whole: torch.Tensor) -> list[torch.Tensor]:
        gate, up = whole[mine].transpose(1, 2).chunk(2, dim=1)
        return [gate.contiguous(), up.contiguous()]

    def own_down(read: Read) -> torch.Tensor:
        return read(w2).transpose(1, 2)

    def join_down(read: Read) -> torch.Tensor:
        return all_experts(own_down(read).contiguous())

    def part(read: Callable[[Read], torch.Tensor]) -> OwnPart:
        return OwnPart(rank, layer.ep_size, 0 in dist.get_process_group_ranks(group), read)

    def split_down(whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[mine].transpose(1, 2).contiguous()]

    name = _folder_name(f"{prefix}.experts")
    return [
        WholeTensor(f"{name}.gate_up_proj", (layer.num_experts, hidden, 2 * width), w1.dtype, (w1, w3),
                    join_gate_up, split_gate_up, part(own_gate_up)),
        WholeTensor(f"{name}.down_proj", (layer.num_experts, width, hidden), w2.dtype, (w2,), join_down, split_down,
                    part(own_down)),
    ]  # fmt: skip
