"""Models: the native Llama 4 mixture of experts, and reading and writing model folders.

Names are handed on lazily, so importing the package does not import torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "NativeLlama4ForCausalLM": "native",
    "NativeLlama4Model": "native",
    "RouterStats": "router_stats",
    "load_model": "load",
    "load_tokenizer": "load",
    "save_model": "load",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
