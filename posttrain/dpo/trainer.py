"""TRL's DPOTrainer, given token ids instead of text.

TRL tokenizes preference data itself whatever columns it is given. Prompts must be the very ids that sampling sends and
a truncated reply must not get an end-of-turn token, so its tokenization is turned off.
"""

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
        return super()._precompute_ref_logps(*args, **kwargs)
