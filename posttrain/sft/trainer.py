"""TRL's SFTTrainer on a DeepSpeed engine, with steps that do not depend on how they are split."""

from trl.trainer.sft_trainer import SFTTrainer

from posttrain.tune.engine import EngineTrainer
from posttrain.tune.steps import StepTrainer


class RowTrainer(EngineTrainer, StepTrainer, SFTTrainer):
    """Trains on the rows of `posttrain.sft.packing`. The last row of its dataset is the blank one."""
