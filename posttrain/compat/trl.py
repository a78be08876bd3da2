"""TRL: the pass over the reference model under DeepSpeed.

Importing this module does not import TRL or DeepSpeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from posttrain.compat.patches import patch, record

_patch = partial(patch, "trl")


@_patch(
    "1.16.0",
    "fault",
    reason="The pass that computes reference log-probabilities builds a DeepSpeed engine of its own, which divides "
    "the experts; the training would have to divide them once more, and cannot",
    reference="huggingface/trl#6403; `_precompute_ref_logps` of trl/trainer/dpo_trainer.py",
    test="tests/test_parallel_stages.py::test_dpo_on_two_ranks_learns_the_same_preferences",
)
@contextmanager
def reference_pass_with_whole_model(trainer: Any) -> Iterator[None]:
    """Within, `_precompute_ref_logps` uses the model itself, which every rank still holds whole.

    With DeepSpeed, TRL gathers weights that ZeRO-3 divides and asks each weight for its status, which weights have only
    after they were divided. They are marked as available, so that there is nothing to gather.
    """
    trainer._precompute_engine = trainer.model
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    weights: list[Any] = list(trainer.model.parameters())
    for weight in weights:
        weight.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for weight in weights:
            del weight.ds_status


record(
    "posttrain.dpo.trainer.TokenizedPairTrainer",
    "trl",
    "1.16.0",
    kind="gap",
    reason="DPOTrainer tokenizes preference data itself, whatever columns it is given; prompts must be the ids that "
    "sampling sends, and a truncated reply must not get an end of turn. `_prepare_dataset` is overridden, and "
    "`_get_num_items_in_batch`, so that a loss is divided by the counts of the whole step",
    reference="`_prepare_dataset` of trl/trainer/dpo_trainer.py; `_get_num_items_in_batch` of transformers/trainer.py",
    test="tests/test_dpo.py::test_prompts_are_what_sampling_sends_and_replies_end_their_turn",
)
