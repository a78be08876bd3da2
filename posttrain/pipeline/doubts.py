"""Config values that are allowed but usually a mistake. `validate` and a run print them, and the run continues."""

from pydantic import BaseModel

from posttrain.config.training import OptimizerConfig
from posttrain.pipeline.inputs import walk

HIGHEST_RATE = 0.01  # ten times a usual learning rate for adapters of low rank


def doubts(config: BaseModel) -> list[str]:
    """One line for each doubtful value, beginning with its key path."""
    return [
        f"{key}.learning_rate: got {section.learning_rate:g}; language models are trained with 1e-7 to 1e-3, and "
        f"mostly diverge above {HIGHEST_RATE:g}"
        for key, section in walk(config)
        if isinstance(section, OptimizerConfig) and section.learning_rate > HIGHEST_RATE
    ]
