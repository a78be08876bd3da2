"""TRL's SFTTrainer on an engine, with steps that do not depend on how rows are dealt out."""

from trl.trainer.sft_trainer import SFTTrainer

from posttrain.tune.engine import EngineTrainer
from posttrain.tune.steps import StepTrainer


class RowTrainer(EngineTrainer, StepTrainer, SFTTrainer):
    """Trains on rows of `posttrain.sft.packing`; the last row of its dataset is the blank one."""
