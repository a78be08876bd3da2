"""Models: the native Llama 4 mixture of experts, and reading and writing model folders.

Names are handed on lazily, so importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.model.load import load_model, load_tokenizer, save_model
    from posttrain.model.native import NativeLlama4ForCausalLM, NativeLlama4Model
    from posttrain.model.router_stats import RouterStats

__all__ = [
    "NativeLlama4ForCausalLM",
    "NativeLlama4Model",
    "RouterStats",
    "load_model",
    "load_tokenizer",
    "save_model",
]

_HOME = {"NativeLlama4ForCausalLM": "native", "NativeLlama4Model": "native", "RouterStats": "router_stats"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOME.get(name, 'load')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
