"""Models: our own Llama 4 ("native"), and the reading and writing of model folders.

native.py            the model, with the names and weights of transformers' Llama 4
attention.py rope.py visibility.py placement.py    attention, positions, and which token sees which
norm.py moe.py       normalisation, and the feed-forward layers with and without experts
router_stats.py router_balance.py    losses and figures on routers; balance of experts from step to step
expert_parallel.py   experts divided among ranks by DeepSpeed
recompute.py         gradient checkpointing
load.py folder.py router_keys.py    load and save a model folder; the checks that need no torch
tensors.py           which tensors the weight files of a folder lack, by their headers
tokenizer.py         load the tokenizer of a model folder, without torch where that can be helped

Public names are imported when they are first used, so that importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.model.load import load_model, save_model
    from posttrain.model.native import NativeLlama4ForCausalLM, NativeLlama4Model
    from posttrain.model.router_stats import RouterStats
    from posttrain.model.tokenizer import load_tokenizer

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
        "load": ["load_model", "save_model"],
        "tokenizer": ["load_tokenizer"],
    },
)
