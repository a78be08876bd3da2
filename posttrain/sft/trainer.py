"""TRL's SFTTrainer on a DeepSpeed engine, with steps that do not depend on how they are split."""

from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from posttrain.tune.engine import EngineTrainer
from posttrain.tune.pictures import PictureTrainer
from posttrain.tune.steps import StepTrainer


class RowTrainer(EngineTrainer, StepTrainer, PictureTrainer, SFTTrainer):
    """Trains on the rows of `posttrain.sft.packing`. The last row of its dataset is the blank one."""

    def held_out_sums(self, model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        """One forward's negative log-likelihood in nats, summed over its trained tokens, and how many these are."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return {"nll": -outputs.log_probs.sum(), "tokens": outputs.label_mask.sum()}

    def held_out_figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures of all held-out rows from their sums: the mean loss over trained tokens."""
        return {"held_out_loss": sums["nll"] / sums["tokens"]}
