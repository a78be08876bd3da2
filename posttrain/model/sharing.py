"""Run a packed tree (tree.py) on the models that can: our own, and dense ones of transformers.

A model of transformers hands its attention to a function that is registered by name, and further arguments of the
forward with it. The function here attends as the argument `visibility` says, and as transformers does without it.

Left out: models whose layers are not plain attention over all earlier tokens. `unshared_reason` says why.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.config.models import ModelConfig
from posttrain.context import StageContext
from posttrain.files import read_object
from posttrain.model.adapter import base_folder

if TYPE_CHECKING:
    from posttrain.model.tree import Tree

# Families whose layers were compared with separate documents: tests/test_shared_prefix.py.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_NAME = "posttrain_tree"


def unshared_reason(config: Mapping[str, Any], *, native: bool) -> str | None:
    """Why the documents of a model cannot share what they have in common; None if they can.

    config: the content of config.json. native: a Llama 4 is run by our own implementation.
    """
    family = str(config.get("model_type"))
    if family in ("llama4", "llama4_text"):
        return None if native else "transformers' Llama 4 counts the borders of chunks along the row"
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if kinds:
        return f"layers of {family} are of the kind {', '.join(kinds)}, for which documents cannot be told apart"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"{family} has sliding windows (sliding_window {config['sliding_window']}), which run along the row"
    if family not in FAMILIES:
        return f"attention of {family} was not compared with separate documents; it was for {', '.join(FAMILIES)}"
    return None


def note_unshared(model: ModelConfig, context: StageContext | None) -> None:
    """Tell the stage's context if the model cannot share prefixes, and why. Only config.json is read."""
    config = read_object(base_folder(model.path) / "config.json")
    if context is None or config is None:  # the code that loads the model reports a missing config.json
        return
    if (reason := unshared_reason(config, native=model.implementation == "native")) is not None:
        context.event("prefixes_unshared", reason=reason)


def accept_trees(model: Any) -> str | None:
    """Prepare a model for `run_tree`. Returns the reason if that cannot be; the model is then as it was."""
    native = _is_native(model)
    reason = unshared_reason(model.config.to_dict(), native=native)
    if reason is None and not native:
        _register()
        model.set_attn_implementation(_NAME)
    return reason


def tree_arguments(model: Any, tree: "Tree") -> dict[str, Any]:
    """The arguments, besides token ids, with which the layers of a model run a tree. The model accepts trees."""
    from posttrain.model.tree_attention import tree_visibility

    if _is_native(model):
        return {"tree": tree, "use_cache": False}
    dropout = float(getattr(model.config, "attention_dropout", 0.0) or 0.0)
    return {
        "position_ids": tree.positions_1T,
        # transformers makes a mask of all tokens by all tokens unless it is given one with four axes.
        "attention_mask": tree.positions_1T.new_ones(1, 1, 1, 1).bool(),
        "visibility": tree_visibility(tree, None, dropout=dropout > 0),
        "use_cache": False,
    }


def _is_native(model: Any) -> bool:
    from posttrain.model.native import NativeLlama4ForCausalLM
    from posttrain.model.vision.fusion import NativeLlama4ForConditionalGeneration

    return isinstance(model, NativeLlama4ForCausalLM | NativeLlama4ForConditionalGeneration)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module: Any, *inputs: Any, visibility: Any = None, **arguments: Any) -> Any:
        """inputs: query, key, value [B, heads, S, d] and the attention mask."""
        if visibility is None:
            return sdpa_attention_forward(module, *inputs, **arguments)
        out = visibility.attend(*inputs[:3], dropout=arguments.get("dropout", 0.0))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
