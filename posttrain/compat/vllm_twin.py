"""vLLM on a CPU: new weights are built beside generation, and are exchanged with the old ones in a moment.

vLLM's own reload takes the layers of the running model apart, so generation must rest while tensors are copied and
packed. Here they are loaded into a twin of the model:

```
twin       every module of the model once more, without tensors; it is never run
build      vLLM's layerwise loader fills and packs the twin's modules, in a thread, while the model generates
exchange   each module that was loaded gives its tensors, and what packing made of them, to its original
```

Importing this module does not import vLLM. All of it runs in vLLM's worker process.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.compat.patches import patch

if TYPE_CHECKING:
    import torch

_patch = partial(patch, "vllm")
# The methods of layers whose loading is known to depend on the layer's tensors alone, by class name.
_PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
_PLAIN_ATTENTION = {"Attention", "ChunkedLocalAttention", "EncoderOnlyAttention", "MMEncoderAttention"}


@dataclass(frozen=True)
class _Pair:
    """A module of the model, and the twin's module that takes its place."""

    original: Any
    twin: Any


@_patch(
    "0.32.0",
    "gap",
    reason="vLLM loads new weights into the model that generates, one layer after the other, so generation rests for "
    "two copies and the packing of all weights. No public function loads into a second set of tensors",
    reference="`initialize_layerwise_reload` and `_layerwise_process` of vllm/model_executor/model_loader/reload/",
    test="tests/test_sampling_stream.py::test_weights_built_beside_generation_are_those_of_a_fresh_engine",
)
class TwinModel:
    """The twin of a model on a CPU. It holds tensors only between `build` and `exchange`."""

    def __init__(self, model: Any):
        twins: dict[int, _Pair] = {}
        self._model = _twin_of(model, twins)
        self._model.__dict__.pop("load_weights", None)  # an instance's own would load into its original
        self._pairs = list(twins.values())
        self._loaded: list[_Pair] = []
        self._before: dict[int, dict[str, Any]] = {}

    def build(self, weights: "Iterable[tuple[str, torch.Tensor]]", note: Callable[[str], None]) -> None:
        """Load tensors, under their checkpoint names, and pack them. The model is not touched.

        note: called with the name of each tensor before it is loaded.
        """
        import torch
        from vllm.model_executor.model_loader.reload.layerwise import (
            LOADING_LAYERS,
            _layerwise_process,
            get_layerwise_info,
            initialize_online_processing,
        )
        from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, restore_layer_on_meta

        def noted() -> "Iterator[tuple[str, torch.Tensor]]":
            for name, tensor in weights:
                note(f"tensor {name}")
                yield name, tensor

        with torch.no_grad():
            for pair in self._pairs:
                restore_layer_on_meta(pair.twin, get_layerwise_info(pair.twin))
                for kind in ("_parameters", "_buffers"):  # such as biases, which vLLM loads in place
                    there = pair.original.__dict__[kind]
                    kept = {
                        name: _clone(there[name]) for name in there.keys() & SKIP_TENSORS if there[name] is not None
                    }
                    pair.twin.__dict__[kind].update(kept)
                initialize_online_processing(pair.twin)
            self._before = {id(pair.twin): dict(pair.twin.__dict__) for pair in self._pairs}
            self._model.load_weights(noted())
            self._loaded = []
            for pair in self._pairs:
                info = get_layerwise_info(pair.twin)
                if info.can_load() and info.load_numel > 0:  # padded tensors are never filled to the last element
                    _layerwise_process(pair.twin, info)
                if not info.can_load():
                    self._loaded.append(pair)
                info.reset()
            LOADING_LAYERS.clear()

    def exchange(self) -> None:
        """Give the model what was built. Modules that no tensor was loaded into keep what they have."""
        for pair in self._loaded:
            before = self._before[id(pair.twin)]
            for name, value in pair.twin.__dict__.items():
                if name in ("_parameters", "_buffers") or (name != "_modules" and before.get(name) is not value):
                    pair.original.__dict__[name] = value
        for pair in self._pairs:
            absent = {kind: _absent(pair.original.__dict__[kind]) for kind in ("_parameters", "_buffers")}
            pair.twin.__dict__.update(absent)
        self._loaded, self._before = [], {}


def can_have_twin(model: Any) -> bool:
    """Whether a model's layers depend on their own tensors alone, and run on a CPU."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False  # a captured graph reads the old addresses, and memory for the weights twice is dear
    owners: dict[int, Any] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _PLAIN_METHODS:
            return False
        if is_deferred_attention_layer(module) and type(module).__name__ not in _PLAIN_ATTENTION:
            return False
        if getattr(module, "w13_bias", None) is not None:  # the kernel of the experts holds these biases itself
            return False
        places = [tensor.data_ptr() for tensor in module._parameters.values() if tensor is not None]
        if any(place and owners.setdefault(place, module) is not module for place in places):
            return False  # tied weights: the one is loaded, and the other would stay
    return True


def _twin_of(module: Any, twins: dict[int, _Pair]) -> Any:
    """The module once more, with children of its own and no tensors. twins: of modules so far, by id."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    if id(module) in twins:
        return twins[id(module)].twin
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twins[id(module)] = _Pair(module, twin)
    of_original, of_twin = get_layerwise_info(module), get_layerwise_info(twin)
    parameters, buffers = of_original.restore_metadata
    of_twin.restore_metadata = (_copied(parameters), _copied(buffers))  # loading changes attributes of these tensors
    of_twin.restore_device = of_original.restore_device
    twin.__dict__.update(
        _parameters=_absent(module._parameters),
        _buffers=_absent(module._buffers),
        _modules={name: child if child is None else _twin_of(child, twins) for name, child in module._modules.items()},
        _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
    )
    return twin


def _absent(tensors: "dict[str, torch.Tensor | None]") -> dict[str, None]:
    """The names that a module has for tensors that it does without, such as the biases of most layers."""
    return {name: None for name, tensor in tensors.items() if tensor is None}


def _copied(tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    return {name: to_meta_tensor(tensor) for name, tensor in tensors.items()}


def _clone(tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy of the class and with the attributes of the tensor, such as its loader."""
    clone: Any = tensor.data.clone()
    clone.__class__ = tensor.__class__
    clone.__dict__ = tensor.__dict__.copy()
    return clone
