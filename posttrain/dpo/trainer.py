"""TRL's DPOTrainer, given token ids instead of text.

TRL tokenizes preference data itself whatever columns it is given. Prompts must be the very ids that sampling sends and
a truncated reply must not get an end-of-turn token, so its tokenization is turned off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer


class TokenizedPairTrainer(DPOTrainer):
    """Trains on a dataset of prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # Every rank still holds the whole model. TRL would build an engine for this pass, and with it divide the
        # experts, which cannot be divided once more for the training.
        self._precompute_engine = self.model
        if not self.is_deepspeed_enabled:
            return super()._precompute_ref_logps(*args, **kwargs)
        with _known_as_whole(self.model):
            return super()._precompute_ref_logps(*args, **kwargs)


@contextmanager
def _known_as_whole(model: Any) -> Iterator[None]:
    """Within, TRL does not try to gather weights that ZeRO-3 has not divided yet: it asks each for its status."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    weights: list[Any] = list(model.parameters())
    for weight in weights:
        weight.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for weight in weights:
            del weight.ds_status
