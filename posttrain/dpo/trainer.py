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
