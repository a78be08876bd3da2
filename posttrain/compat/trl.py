"""TRL: the pass over the reference model under DeepSpeed, and the chat templates for training by name.

Importing this module does not import TRL or DeepSpeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
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


class _Writing:
    """An accelerator that counts this rank as the main process."""

    is_main_process = True

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


@_patch(
    "1.16.0",
    "gap",
    reason="TRL lets rank 0 write the reference log-probabilities to a file beside the dataset, and all ranks read it. "
    "Ranks on several hosts do not see the same file, so the first rank of each host writes one",
    reference="`_precompute_ref_logps` of trl/trainer/dpo_trainer.py",
    test="tests/test_tune_home.py::test_the_first_rank_of_each_host_writes_the_reference",
)
@contextmanager
def reference_written_on_each_host(trainer: Any, writes: bool) -> Iterator[None]:
    """Within the block, `_precompute_ref_logps` writes its file on this rank. writes: False leaves it to rank 0."""
    accelerator = trainer.accelerator
    if writes:
        trainer.accelerator = _Writing(accelerator)
    try:
        yield
    finally:
        trainer.accelerator = accelerator


@_patch(
    "1.16.0",
    "gap",
    reason="`get_training_chat_template` knows a family only by the exact text of the model's template, and imports "
    "torch. No public function gives a training template by the name of its family",
    reference="trl/chat_templates",
    test="tests/test_templates.py::test_every_builtin_template_can_be_read",
)
@cache
def training_templates() -> dict[str, Path]:
    """The files of TRL's chat templates for training, by the name of the family, such as qwen3."""
    spec = find_spec("trl")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = (file for folder in folders for file in Path(folder).glob("chat_templates/*_training.jinja"))
    return {file.stem.removesuffix("_training"): file for file in sorted(files)}


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
