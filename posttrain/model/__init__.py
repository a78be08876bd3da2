"""Models: the native Llama 4 mixture of experts, and reading and writing model folders.

Public names are imported when they are first used, so that importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "native": ["NativeLlama4ForCausalLM", "NativeLlama4Model"],
        "router_stats": ["RouterStats"],
        "load": ["load_model", "load_tokenizer", "save_model"],
    },
)
