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
    reason="For the pass that computes reference log-probabilities TRL builds a DeepSpeed engine, which divides the "
    "experts. The training would have to divide the same experts again, which fails",
    reference="huggingface/trl#6403; `_precompute_ref_logps` of trl/trainer/dpo_trainer.py",
    test="tests/test_parallel_stages.py::test_dpo_on_two_ranks_learns_the_same_preferences",
)
@contextmanager
def reference_pass_with_whole_model(trainer: Any) -> Iterator[None]:
    """Within the block, `_precompute_ref_logps` runs the model itself, which every rank still holds whole.

    With DeepSpeed, TRL gathers the weights that ZeRO-3 divides. For this it reads the status of each weight, an
    attribute that weights get only when they are divided. Here they are given the status "available", so that TRL
    gathers nothing.
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
    reason="DPOTrainer always tokenizes preference data itself. But prompts must be the token ids that sampling sends, "
    "and a truncated reply must not get an end-of-turn token, so `_prepare_dataset` is overridden. "
    "`_get_num_items_in_batch` is overridden too, so that a loss is divided by the counts of the whole step",
    reference="`_prepare_dataset` of trl/trainer/dpo_trainer.py; `_get_num_items_in_batch` of transformers/trainer.py",
    test="tests/test_dpo.py::test_prompts_are_what_sampling_sends_and_replies_end_their_turn",
)
