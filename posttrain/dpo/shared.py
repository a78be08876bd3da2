"""Run the two replies of each pair behind one copy of their prompt.

TRL's collator gives a padded row for each reply. They are packed into one row here (posttrain/train/prefixes.py), and
the log-probabilities are put back where TRL would have them. Left out: models that cannot do so
(posttrain/model/sharing.py), and dropout of adapters, which is drawn for a token of a reply's own row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from posttrain.model.sharing import tree_arguments
from posttrain.train.prefixes import Document, pack


class ReplyOutputs(NamedTuple):
    """log_probs: fp32 [2 P, S - 1], 0 where there is no reply token. entropy: of each reply token, nats."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


def run_shared(model: Callable[..., Any], causal: Any, inputs: Mapping[str, torch.Tensor]) -> ReplyOutputs:
    """Run a batch of pairs, of which at least one has a reply token.

    model: `causal`, or what wraps it, with the head of `trl.trainer.utils.add_fused_lm_head`. inputs: of TRL's
    collator, the chosen replies first: input_ids, attention_mask and completion_mask, [2 P, S].
    """
    trained = inputs["completion_mask"]
    documents, places_of_targets = [], []
    for ids, real, reply in zip(inputs["input_ids"], inputs["attention_mask"].bool(), trained, strict=True):
        marks = reply[real].tolist()
        documents.append(Document(tuple(ids[real].tolist()), marks.index(1) if 1 in marks else len(marks)))
        places_of_targets.append([place for place, mark in enumerate(marks) if mark])
    packed = pack(documents, trained.device)
    before = [places[i - 1] for places, wanted in zip(packed.places, places_of_targets, strict=True) for i in wanted]
    states = torch.tensor(before, device=trained.device)

    def keep_states(module: Any, arguments: Any, output: Any) -> Any:
        """Leave the head only the states that predict a reply token. The last one of a prompt predicts two."""
        output.last_hidden_state = output.last_hidden_state[:, states]
        return output

    layers = causal.language_model.model if hasattr(causal, "vision_model") else causal.base_model
    hook = layers.register_forward_hook(keep_states)
    try:
        targets = inputs["input_ids"][trained.bool()][None]
        outputs = model(
            input_ids=packed.ids_1T, **tree_arguments(causal, packed.tree), shift_labels=targets, fused_lm_head=True
        )
    finally:
        hook.remove()
    rows, columns = trained[:, 1:].nonzero(as_tuple=True)
    log_probs = outputs.log_probs.new_zeros(trained[:, 1:].shape).index_put((rows, columns), outputs.log_probs[0])
    return ReplyOutputs(log_probs, outputs.entropy)
